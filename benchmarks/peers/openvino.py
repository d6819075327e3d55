"""OpenVINO GenAI over what optimum-intel made of the checkpoint, unpruned or with its CDPruner.

All in float32, the KV cache too, unless --defaults leaves the precision to OpenVINO: on a processor with AMX that is
bfloat16, and a KV cache of 8 bits.
"""

import time

import numpy as np
import openvino
import openvino_genai
from PIL import Image

from benchmarks.peers.worker import Answer, Ask, arguments, serve

_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def main() -> None:
    """Answer requests."""
    args = arguments()
    precision = {} if args.defaults else _FLOAT32
    pipe = openvino_genai.VLMPipeline(str(args.model), "CPU", INFERENCE_NUM_THREADS=args.threads, **precision)

    def answer(ask: Ask) -> Answer:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = ask.max_new_tokens
        config.ignore_eos = True
        config.pruning_ratio = round(100 * (1 - ask.keep_ratio))  # per cent dropped; 0 is off
        begun = time.perf_counter()
        with Image.open(ask.image) as image:
            pixels = openvino.Tensor(np.asarray(image.convert("RGB"))[None])
        result = pipe.generate(ask.prompt, images=[pixels], generation_config=config)
        total = 1e3 * (time.perf_counter() - begun)
        tokens, token_ms = result.perf_metrics.get_num_generated_tokens(), result.perf_metrics.get_tpot().mean
        return Answer(total - token_ms * (tokens - 1), token_ms, tokens, result.texts[0])

    serve(("openvino", "openvino-genai", "optimum-intel"), answer)


if __name__ == "__main__":
    main()
