"""Questions as the harnesses ask them."""

from PIL import Image

from hawk_trt import PruningConfig

PRUNING = PruningConfig(keep_ratio=0.2)
WHOLE = 12


def turn(sample, **more):
    content = [{"type": "image", "url": Image.fromarray(sample.image)}, {"type": "text", "text": sample.question}]
    return [{"role": "user", "content": [*content, *more.get("items", ())]}]


def texts(results):
    return [result.text for result in results]
