"""hawk_trt in ONNX Runtime, over a bundle."""

import numpy as np

from benchmarks.peers.worker import Answer, Ask, arguments, serve
from hawk_trt import ModelInputs, Pipeline, PruningConfig


def main() -> None:
    """Answer requests."""
    args = arguments()
    pipe = Pipeline.load(args.model, threads=args.threads, vision_cache_mb=0)

    def answer(ask: Ask) -> Answer:
        text = ask.text_ids is not None
        result = pipe.generate(
            ModelInputs(np.array(ask.text_ids)) if text else args.prompt,
            images=[] if text else [args.image],
            pruning=PruningConfig(ask.keep_ratio),
            max_new_tokens=ask.max_new_tokens,
            ignore_eos=True,
        )
        times, tokens = result.timings, result.token_ids
        return Answer(
            first_token_ms=1e3 * (times.total - times.decode),
            token_ms=1e3 * times.decode / max(len(tokens) - 1, 1),
            num_tokens=len(tokens),
            text=" ".join(map(str, tokens)) if text else result.text or "",
        )

    serve(("onnxruntime",), answer)


if __name__ == "__main__":
    main()
