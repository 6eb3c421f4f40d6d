"""
The part of vLLM's HTTP interface that TRL's asynchronous trainer talks to, served by a small model on a CPU:

    python -m recipes.clock.server MODEL_DIR [--port PORT] [--lora MAX_RANK]

It prints its port and serves until its standard input is closed, so that none outlives the run that started it.
Requests that arrive together are decoded as one batch. Weights come as an adapter's folder, as to vLLM, or, in place
of NCCL, as safetensors in the body of `POST /weights`.
"""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty, Queue

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

LARGEST_BATCH, MAX_LENGTH, WAIT_S = 128, 512, 0.01


class Engine:
    """
    Samples from a model, a batch at a time in a thread of its own; between two batches its weights can be replaced.

    Args:
        folder (`str`):
            Folder of the model, which is also its name in requests.
        max_lora_rank (`int`, *optional*):
            Largest rank of an adapter. Unset: adapters are not served.
    """

    def __init__(self, folder: str, max_lora_rank: int | None = None):
        self.name, self.max_lora_rank = folder, max_lora_rank
        self.model = self.base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        eos = self.base.generation_config.eos_token_id
        self.eos = {*eos} if isinstance(eos, list) else {eos}
        self.adapters: list[str] = []
        self.served: dict[str, int] = {}  # requests by the name of the model
        self.requests: Queue[tuple[dict, Future]] = Queue()
        self.open, self.busy = threading.Event(), threading.Lock()
        self.open.set()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            waiting = [self.requests.get()]
            time.sleep(WAIT_S)
            with contextlib.suppress(Empty):
                while len(waiting) < LARGEST_BATCH:
                    waiting.append(self.requests.get_nowait())
            self.open.wait()
            for name in dict.fromkeys(request["model"] for request, _ in waiting):
                same = [(request, answer) for request, answer in waiting if request["model"] == name]
                try:
                    with self.busy:
                        choices = self.complete(name, [request for request, _ in same])
                except Exception as error:
                    for _, answer in same:
                        answer.set_exception(error)
                else:
                    for (_, answer), choice in zip(same, choices, strict=True):
                        answer.set_result(choice)

    @contextlib.contextmanager
    def _selected(self, name: str):
        """The model that a request names: an adapter's, or, under its own name, the one without."""
        if name in self.adapters:
            self.model.set_adapter(name)
            yield self.model
        elif name != self.name:
            raise LookupError(f"no model {name}")
        elif self.model is self.base:
            yield self.base
        else:
            with self.model.disable_adapter():
                yield self.model

    @torch.no_grad()
    def complete(self, name: str, requests: list[dict]) -> list[dict]:
        """One choice per request, sampled at the first one's temperature, with log-probs of that distribution."""
        self.served[name] = self.served.get(name, 0) + len(requests)
        prompts, temperature = [request["prompt"] for request in requests], requests[0].get("temperature", 1.0)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        tokens, log_probs, cache = [[] for _ in prompts], [[] for _ in prompts], None
        unfinished = {*range(len(prompts))}
        with self._selected(name) as model:
            while unfinished:
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :]
                output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                distribution = (output.logits[:, -1].float() / temperature).log_softmax(-1)
                ids = torch.multinomial(distribution.exp(), 1)
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
                for row in [*unfinished]:
                    tokens[row].append(int(ids[row]))
                    log_probs[row].append(float(distribution[row, ids[row]]))
                    if tokens[row][-1] in self.eos or len(tokens[row]) >= requests[row]["max_tokens"]:
                        unfinished.remove(row)
        return [
            {
                "index": 0,
                "text": "",
                "token_ids": ids,
                "logprobs": {"token_logprobs": values},
                "finish_reason": "stop" if ids[-1] in self.eos else "length",
            }
            for ids, values in zip(tokens, log_probs, strict=True)
        ]

    def pause(self):
        """Starts no batch any more, and returns when the one in progress is done."""
        self.open.clear()
        with self.busy:
            pass

    def load_weights(self, body: bytes):
        """Replaces the weights of the model itself."""
        with self.busy:
            missing, unexpected = self.base.load_state_dict(safetensors.torch.load(body), strict=False)
        if unexpected or missing:
            raise ValueError(f"weights of another model: missing {missing}, unexpected {unexpected}")

    def load_adapter(self, name: str, folder: str):
        """Serves the adapter of a folder under a name."""
        from peft import PeftModel

        with self.busy:
            if self.model is self.base:
                self.model = PeftModel.from_pretrained(self.base, folder, adapter_name=name).eval()
            else:
                self.model.load_adapter(folder, adapter_name=name)
            self.adapters.append(name)

    def unload_adapter(self, name: str):
        """Serves it no longer."""
        with self.busy:
            self.adapters.remove(name)
            self.model.delete_adapter(name)


class Handler(BaseHTTPRequestHandler):
    """Paths to methods of the engine."""

    engine: Engine
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: dict, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        engine, path = self.engine, self.path.split("?")[0]
        lora = engine.max_lora_rank and {"max_lora_rank": engine.max_lora_rank, "max_loras": 8}
        config = {
            "model_config": {"dtype": "torch.float32"},
            "lora_config": lora or None,
            "parallel_config": {"data_parallel_size": 1},
        }
        answers = {
            "/health": {},
            "/v1/models": {"data": [{"id": engine.name, "max_model_len": MAX_LENGTH}]},
            "/server_info": {"vllm_config": config},
            "/served": engine.served,
        }
        self.answer(answers.get(path, {}), 200 if path in answers else 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self.answer(self._done(self.path.split("?")[0], body))
        except LookupError as error:
            self.answer({"error": str(error)}, 404)
        except Exception as error:
            self.answer({"error": repr(error)}, 500)

    def _done(self, path: str, body: bytes) -> dict:
        engine = self.engine
        if path == "/weights":
            engine.load_weights(body)
            return {}
        content = json.loads(body) if body else {}
        if path == "/v1/completions":
            answer: Future = Future()
            engine.requests.put((content, answer))
            return {"id": "0", "choices": [answer.result()]}
        if path == "/pause":
            engine.pause()
        elif path == "/resume":
            engine.open.set()
        elif path == "/v1/load_lora_adapter":
            engine.load_adapter(content["lora_name"], content["lora_path"])
        elif path == "/v1/unload_lora_adapter":
            engine.unload_adapter(content["lora_name"])
        else:
            raise LookupError(f"no path {path}")
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a small model to TRL's asynchronous trainer, on a CPU.")
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder of the model")
    parser.add_argument("--port", type=int, default=0, help="port, default: a free one")
    parser.add_argument("--lora", type=int, metavar="MAX_RANK", help="serve adapters up to this rank")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples, default: 0")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(given.seed)
    Handler.engine = Engine(given.model_dir, given.lora)
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()  # until the parent is gone
    os._exit(0)


if __name__ == "__main__":
    main()
