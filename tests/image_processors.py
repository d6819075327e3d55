"""A family's patches against transformers' PIL image processor, bit for bit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from hawk_trt.inputs.images import resize
from hawk_trt.models.family import Family


def check_patches(family: Family, preprocessor: Mapping[str, Any], image: npt.NDArray[np.uint8]) -> None:
    """Compare the patches of an RGB image, with the settings of a preprocessor_config.json."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(**preprocessor)
    settings = family.image_settings(preprocessor)
    ours = family.images_to_patches([image], settings)
    theirs = processor([Image.fromarray(image)], return_tensors="np")
    np.testing.assert_array_equal(ours.grid_thw, theirs["image_grid_thw"])
    _, rows, columns = (ours.grid_thw[0] * family.vision.patch_size).tolist()
    resized = resize(image, rows, columns, settings.resample)
    if not np.array_equal(np.asarray(Image.fromarray(image).resize((columns, rows), settings.resample)), resized):
        # This Pillow resizes such an image height first (see images.resize): give transformers the resized one.
        assert int(PIL.__version__.split(".")[0]) >= 13
        theirs = processor([Image.fromarray(resized)], return_tensors="np")
    np.testing.assert_array_equal(ours.pixel_values, theirs["pixel_values"])
