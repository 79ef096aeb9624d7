"""EdgeSFT: from a pretrained model to a verified, profiled and gated edge artefact."""

__version__ = "0.1.0"
