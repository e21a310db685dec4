"""The general help."""

USAGE = """usage: nfnet COMMAND ...

  nfnet train RECIPE.py --workdir DIR [--FIELD VALUE ...]   train, or continue the run in DIR
  nfnet train RECIPE.py:variant=f3 --workdir DIR            the same, with an argument of the recipe
  nfnet train RECIPE.py --debug --workdir DIR               four steps of it on a laptop: small network, no data needed
  nfnet train RECIPE.py --help                              every field of the recipe
  nfnet COMMAND ... --code FILE.py                          with networks, sources or objectives of one's own
  nfnet eval --workdir DIR [--checkpoint best|STEP]         evaluate a checkpoint of a run; by default the newest
  nfnet plan RECIPE.py --topology v5e:2x4 [--search]        compile the step for a TPU: memory, cost; needs no TPU
  nfnet doctor [--workdir DIR] [--recipe FILE]              what is wrong with machine, data, run? (code 1: something)
  nfnet models [PATTERN]                                    the named networks, such as 'nf_*'
  nfnet convert haiku FILE --model NAME --out DIR           a published pickle -> NAME.safetensors
  nfnet convert timm FILE --model NAME --out DIR            timm's .safetensors -> NAME.safetensors
  nfnet convert run DIR --out DIR [--checkpoint best|STEP]  a checkpoint of a run -> weights.safetensors
  nfnet COMMAND --help                                      every option of a command

exit codes: 0 done, 1 a bug (doctor: something is wrong), 2 bad input or a folder in use, 3 diverged,
            4 the input failed, 5 a process died, hung or did not come, or lost the folder to another one,
            6 the run's folder failed, 7 copies of the state differ, 75 stopped and saved (run the same command again)
"""
