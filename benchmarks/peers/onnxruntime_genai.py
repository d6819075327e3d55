"""onnxruntime-genai over the language model that its builder makes; unpruned, for it prunes nothing.

It has a pipeline for Qwen2.5-VL, but its builder makes none of the three vision graphs that this takes, so prompts are
text of the same number of tokens.
"""

import json
import time

import numpy as np
import onnxruntime_genai as og

from benchmarks.peers.worker import Answer, Ask, arguments, serve


def main() -> None:
    """Answer requests."""
    args = arguments()
    config = og.Config(str(args.model))
    options = {"intra_op_num_threads": args.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = og.Model(config)

    def answer(ask: Ask) -> Answer:
        if ask.keep_ratio != 1.0 or ask.text_ids is None:
            raise ValueError(f"{ask}: expected text alone, and nothing pruned")
        length = len(ask.text_ids) + ask.max_new_tokens
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        begun = time.perf_counter()
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(ask.text_ids, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(ask.max_new_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        tokens = generator.get_sequence(0)[len(ask.text_ids) :]
        return Answer(
            first_token_ms=1e3 * (first - begun),
            token_ms=1e3 * (ended - first) / max(len(tokens) - 1, 1),
            num_tokens=len(tokens),
            text=" ".join(map(str, tokens)),
        )

    serve(("onnxruntime-genai", "onnxruntime"), answer)


if __name__ == "__main__":
    main()
