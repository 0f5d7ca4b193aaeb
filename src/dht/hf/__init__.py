"""The Hugging Face side; importing it registers the model with the Auto classes."""

from . import modeling as modeling
