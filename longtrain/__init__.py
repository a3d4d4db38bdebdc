"""longtrain: training LLaMA- and OPT-style decoders at long context."""

__version__ = "0.1.0"
