"""Long runs that anyone can repeat: the recipes of the shipped checkpoints, and sweeps whose results are recorded."""

#: modules here that have a STUDY
STUDIES = ("caching", "decoding", "eagle", "pairs", "qat", "quantization")
