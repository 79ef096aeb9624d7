"""Worker: a GGUF file by llama.cpp. Run by an environment that has it: llamacpp.py FILE THREADS."""

import ctypes
import sys
import time

import llama_cpp as ll
import numpy as np
from talk import serve


def main(file: str, threads: int) -> None:
    ll.llama_backend_init()
    ll.llama_log_set(_quiet, None)
    model = ll.llama_model_load_from_file(file.encode(), ll.llama_model_default_params())
    assert model, "llama.cpp cannot load the model"
    vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))

    def run(prompt: list[int], new: int) -> dict:
        wanted = ll.llama_context_default_params()
        wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = len(prompt) + new + 8, 512, 512
        wanted.n_threads = wanted.n_threads_batch = threads
        context = ll.llama_init_from_model(model, wanted)
        assert context

        def feed(ids: list[int]) -> int:
            array = (ll.llama_token * len(ids))(*ids)
            assert ll.llama_decode(context, ll.llama_batch_get_one(array, len(ids))) == 0
            logits = ll.llama_get_logits_ith(context, -1)
            return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

        began = time.perf_counter()
        tokens = [feed(prompt)]
        first = time.perf_counter()
        while len(tokens) < new:
            tokens.append(feed(tokens[-1:]))
        last = time.perf_counter()
        ll.llama_free(context)
        return {"prefill_s": first - began, "decode_s": last - first, "tokens": tokens}

    serve(run)


@ll.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
