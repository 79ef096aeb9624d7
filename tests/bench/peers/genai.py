"""Worker: a folder of onnxruntime-genai. Run by an environment that has it: genai.py FOLDER THREADS."""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime_genai as og
from talk import serve


def main(folder: Path, threads: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.iterdir():
            (Path(scratch) / file.name).symlink_to(file.resolve())
        config = Path(scratch) / "genai_config.json"
        said = json.loads(config.read_text())
        said["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
        config.unlink()
        config.write_text(json.dumps(said))
        model_data = Path(scratch) / "model.onnx.data"
        if model_data.is_symlink():  # the runtime refuses links
            for name in ("model.onnx", "model.onnx.data"):
                (Path(scratch) / name).unlink()
                shutil.copy(folder / name, Path(scratch) / name)
        model = og.Model(scratch)

        def run(prompt: list[int], new: int) -> dict:
            options = og.GeneratorParams(model)
            options.set_search_options(
                max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False
            )
            generator = og.Generator(model, options)
            began = time.perf_counter()
            generator.append_tokens(prompt)
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(new - 1):
                generator.generate_next_token()
            last = time.perf_counter()
            tokens = [int(t) for t in generator.get_sequence(0)[len(prompt) :]]
            assert len(tokens) == new, (len(tokens), new)
            return {"prefill_s": first - began, "decode_s": last - first, "tokens": tokens}

        serve(run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
