"""hawk_trt in ONNX Runtime, over a bundle."""

from benchmarks.peers.worker import Answer, Ask, arguments, serve
from hawk_trt import Pipeline, PruningConfig


def main() -> None:
    """Answer requests."""
    args = arguments()
    pipe = Pipeline.load(args.model, threads=args.threads, vision_cache_mb=0)

    def answer(ask: Ask) -> Answer:
        result = pipe.generate(
            ask.prompt,
            images=[ask.image],
            pruning=PruningConfig(ask.keep_ratio),
            max_new_tokens=ask.max_new_tokens,
            ignore_eos=True,
        )
        times, tokens = result.timings, len(result.token_ids)
        first, later = 1e3 * (times.total - times.decode), 1e3 * times.decode / max(tokens - 1, 1)
        return Answer(first, later, tokens, result.text or "")

    serve(("onnxruntime",), answer)


if __name__ == "__main__":
    main()
