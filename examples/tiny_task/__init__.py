"""The task that examples/tiny-vlm was trained on: scenes of coloured glyphs, and questions about them.

The demo, the tests and accuracy runs make as many fresh samples as they like, the same for the same seed.
"""

from .questions import QUESTION_KINDS, Question
from .samples import Sample, generate
from .scene import Box, Scene, Thing

__all__ = ["QUESTION_KINDS", "Box", "Question", "Sample", "Scene", "Thing", "generate"]
