"""The commands of `fusion-lens`: options in, exit code out. `cli` puts them together. Heavy
packages are imported inside the functions, so that `--help` is quick."""
