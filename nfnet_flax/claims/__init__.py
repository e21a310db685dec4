"""What the papers on normalizer-free networks claim, each as a command that prints its evidence (`nfnet claim`).

Each module has one claim: it measures, and makes text and picture from what was measured, which is kept as JSON
(`evidence.py`). Where a claim needs many short runs, `study.py` carries them out.
"""
