"""What every worker says and hears: a line of JSON each way.

    {"prompt": [ids], "new": 128}  ->  {"prefill_s": 0.1, "decode_s": 0.5, "tokens": [ids]}

prefill_s: until the first new token is known; decode_s: of the other new - 1. Greedy, and never stopped by an
end token. The line `{"ready": true}` comes first, when the model is loaded and warm.
"""

import json
import sys
from collections.abc import Callable


def serve(run: Callable[[list[int], int], dict]) -> None:
    """Answer until the input ends. run(prompt, new) does the work."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print, and only answers may go out
    run([1] * 8, 4)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["prompt"], asked["new"])), file=out, flush=True)
