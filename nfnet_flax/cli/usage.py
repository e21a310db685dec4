"""The general help."""

VERBOSITY = """every command: -q, --quiet    print only warnings, errors and the result
               -v, --verbose  print lines with the time, notes of the libraries, and whole tracebacks"""
USAGE = """usage: nfnet COMMAND ...

  nfnet train RECIPE.py --workdir DIR [--FIELD VALUE ...]   train, or continue the run in DIR
  nfnet train RECIPE.py:variant=f3 --workdir DIR            the same, with an argument for the recipe
  nfnet train digits --workdir DIR                          a recipe of the package, by its name
  nfnet recipes                                             list these; nfnet recipes copy NAME DIR copies one
  nfnet train RECIPE.py --debug --workdir DIR               four steps on a laptop: a small network, no data needed
  nfnet train RECIPE.py --help                              every field of the recipe
  nfnet COMMAND ... --code FILE.py                          use your own networks, sources or objectives
  nfnet eval --workdir DIR [--checkpoint best|STEP | --all] evaluate a checkpoint of a run; by default the newest
  nfnet eval --weights FILE|NAME --data.source.root DIR     evaluate weights on any images; --help lists the results
  nfnet predict FILE|FOLDER|PATTERN ... --workdir DIR       predict classes of images; --csv, --json or --html FILE
  nfnet predict --images-from FILE|- --workdir DIR          the same, of the images that a text file or a pipe names
  nfnet predict ... --weights FILE|FOLDER|timm/NAME         the same, by weights that are not of a run
  nfnet plan RECIPE.py --topology v5e:2x4 [--search]        memory and time of the step on a TPU; needs no TPU
  nfnet plan RECIPE.py --topology h100:8                    what the step's program for GPUs shows; needs no GPU
  nfnet doctor [--workdir DIR] [--recipe FILE]              find problems of the machine, the data and the run
  nfnet doctor --report ...                                 the same as a text for a public issue
  nfnet report RUN [RUN ...] [--out report.html]            goodput, what interruptions cost, curves, accuracy, recipe
  nfnet agc RUN [--out agc.png]                             what AGC clipped, by layer; a picture of layers and steps
  nfnet probe IMAGES --weights WEIGHTS                      is it worth fine-tuning? Regression on the features
  nfnet signal MODEL|RUN|WEIGHTS [--out FILE.png]           how the signal grows with depth, as a table and a picture
  nfnet claim NAME [--out DIR]                              measures what the paper claims; nfnet claim --help
  nfnet models [PATTERN]                                    list the named networks, such as 'nf_*'
  nfnet convert haiku FILE --model NAME --out DIR           a published pickle -> NAME.safetensors
  nfnet convert timm FILE --model NAME --out DIR            timm's .safetensors -> NAME.safetensors
  nfnet convert timm timm/NAME --out DIR                    the same from a model hub
  nfnet convert run DIR --out DIR [--checkpoint best|STEP]  a checkpoint of a run -> weights.safetensors
  nfnet convert run DIR --out DIR --to hub-folder           the same as a folder for a model hub and timm
  nfnet export FILE --to onnx|stablehlo --out DIR           a network for use without this package
  nfnet export --workdir DIR --to onnx --out DIR            the same, of a run; --to safetensors: folded weights alone
  nfnet COMMAND ... -q | -v                                 less output: only warnings, errors, result | more
  nfnet COMMAND --help                                      every option of a command
  nfnet --version                                           versions of this package and of those that it uses

exit codes: 0 done, 1 a bug (doctor: something is wrong; predict, claim: something has no result), 2 bad input or a
            folder in use, 3 the loss is not finite, 4 the input failed (a worker died or hung, or a file cannot be
            read), 5 a process died, hung or did not start, or another one took over the folder, 6 the run's folder
            cannot be read or written, 7 devices or processes hold different copies of the state, 75 stopped and saved
            (run the same command again)
"""
