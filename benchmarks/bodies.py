"""Measures what one HTTP body costs a router, at its worst: memory for each byte, and how long the event loop stands.

`python benchmarks/bodies.py [--context 32768] [--only NAME,...]`
Every body is sent alone, over a socket, to a new process that serves the real HTTP app: real service, admission and
link over gRPC to the real engine of one shard in another process; only the model's step is a stub that draws one token.
A row of the table is one body: its size, the answer's status, the router's peak of resident memory above that before,
in MB and for each byte of the body beyond the first 8 MB, the longest time for which its event loop kept a 1 ms ticker
waiting, the same two of the shard, and how long the answer took.
The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.make_checkpoint import EOS, CheckpointWriter, write_tokenizer  # noqa: E402
from model.placement import Placement  # noqa: E402
from model.step import SampledToken, StepHeader, StepPlan, StepResult, TokenLogprob  # noqa: E402
from serving.config import RouterConfig, SchedulerConfig  # noqa: E402
from serving.engine.agreement import Agreement  # noqa: E402
from serving.engine.engine import Engine  # noqa: E402
from serving.engine.request import Submission  # noqa: E402
from serving.engine.scheduler import Scheduler  # noqa: E402
from serving.ingress.body_bounds import MAX_BODY_BYTES  # noqa: E402
from serving.ingress.http.app import build_http_app  # noqa: E402
from serving.ingress.http.server import HttpServer  # noqa: E402
from serving.link.epoch import DeviceFacts, Epoch, Member, RequestShare  # noqa: E402
from serving.link.server import ShardLinkServer, start_link_server  # noqa: E402
from serving.metrics import RouterMetrics  # noqa: E402
from serving.router.generation import ModelCard  # noqa: E402
from serving.router.service import InferenceService  # noqa: E402
from serving.supervision import run_endless  # noqa: E402
from serving.text.tokenizer import Tokenizer  # noqa: E402

NUM_EMBEDDINGS = 512
BLOCK_SIZE = 16
FREE_BYTES = 8e6            # what any request may cost: threads, buffers, what the allocator takes at a time
ANSWER_TIMEOUT_S = 120.0
FILLER = 9                  # a token id
SHARES = (RequestShare(1.0, 2048),)
TOOLS_TEMPLATE = "{% if tools %}<tool_call>{{ tools | tojson }}\n{% endif %}"
ROW = "{:46} {:>9} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>6}"


class OneTokenExecutor:
    """A shard alone: every step draws the same token, and scores what is asked for."""

    prepared_revision = 0

    def __init__(self, step_s: float = 0.002) -> None:
        self._step_s = step_s

    async def agree(self, header: StepHeader, plan: StepPlan) -> tuple[Agreement, StepResult | None]:
        agreement = Agreement((header,))
        return agreement, await self.execute(plan, agreement) if agreement.is_step else None

    async def prepare(self, submission: Submission) -> None:
        """Compile no grammar: what that costs a shard is bounded by its own thread."""

    async def switch(self, revision: int) -> None:
        raise AssertionError("there is one revision")

    async def execute(self, plan: StepPlan, agreement: Agreement) -> StepResult:
        await asyncio.sleep(self._step_s)
        tokens = []
        for request in plan.requests:
            scored = None if request.num_prompt_logprobs is None else _scored(request.num_prompt_logprobs)
            spec = request.sampling
            tokens.append(SampledToken(
                request.request_id, None if spec is None else FILLER,
                None if spec is None or spec.num_logprobs is None else _scored(spec.num_logprobs),
                () if scored is None else (scored,) * len(request.prompt_targets)))
        return StepResult(plan.epoch_number, plan.step_index, tuple(tokens))


def _scored(num_top: int) -> TokenLogprob:
    return TokenLogprob(FILLER, -0.5, tuple((token_id, -1.0) for token_id in range(num_top)))


@dataclass(frozen=True, slots=True)
class Body:
    name: str
    path: str
    make: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class Cost:
    name: str
    num_bytes: int
    status: int
    peak_mb: float
    bytes_per_byte: float
    block_ms: float
    shard_peak_mb: float
    shard_block_ms: float
    answer_s: float


def completion(**fields: object) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 2, **fields}).encode()


def filled(before: str, piece: str, after: str, num_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return a body of that size: `piece` again and again between the others."""
    head, tail, one = before.encode(), after.encode(), piece.encode()
    return head + one * ((num_bytes - len(head) - len(tail)) // len(one)) + tail


def hostile_bodies(context: int) -> Iterator[Body]:
    prompt, chat = '{"model":"m","prompt":', '{"model":"m","messages":'
    message = '{"role":"user","content":"a"},'
    last_message = message.removesuffix(",") + "]}"

    def of(path: str, name: str, before: str, piece: str, after: str) -> Body:
        return Body(name, path, lambda: filled(before, piece, after))

    def just(name: str, **fields: object) -> Body:
        return Body(name, "/v1/completions", lambda: completion(**fields))

    completions, chats = "/v1/completions", "/v1/chat/completions"
    yield just("usual", prompt="hello")
    for name, piece, last in (
            ("objects", "{},", "{}"), ("lists", "[],", "[]"), ("short strings", '"ab",', '"ab"'),
            ("nulls", "null,", "1"),
            ("floats", "0.5,", "1"), ("ids", "1,", "1"), ("wide ids", "300,", "1"), ("huge ids", "4294967296,", "1"),
            ("lists of ids", "[1,2,3,4],", "[1]"), ("spaced ids", "1 ,\n\t", "1"), ("mixed", '1,"a",', "1")):
        yield of(completions, f"prompt: {name}", prompt + "[", piece, last + "]}")
    for name, piece in (("letters", "a"), ("escapes", "\\n"), ("unicode escapes", "\\u00e9"),
                        ("pairs", "\\ud83d\\ude00"), ("random", "a~Q%"), ("words", "the cat "),
                        ("wide characters", "\U0001f600"),
                        ("spaces", " "), ("quotes", '\\"')):
        yield of(completions, f"prompt text: {name}", prompt + '"', piece, '"}')
        yield of(chats, f"message text: {name}", chat + '[{"role":"user","content":"', piece, '"}]}')
    yield of(completions, "prompt text: one wide character", prompt + '"\U0001f600', "a", '"}')
    yield of(completions, "prompt text never ends", prompt + '"', "\\\\", "")
    yield of(chats, "messages", chat + "[", message, last_message)
    yield of(chats, "parts", chat + '[{"role":"user","content":[', '{"type":"text","text":"a"},', '{"type":"text"}]}]}')
    yield of(chats, "roles", chat + '[{"content":"a","role":"', "user", '"}]}')
    yield of(chats, "unknown fields of a message", chat + '[{"role":"user","content":"a","x":[', "1,", "1]}]}")
    yield of(chats, "template variables", chat + '[],"chat_template_kwargs":{"a":[', "{},", "{}]}}")
    yield of(chats, "tools", chat + '[],"tool_choice":"none","tools":[', "{},", "{}]}")
    yield of(completions, "deep lists", prompt, "[", "")
    yield of(completions, "deep objects", prompt, '{"a":', "")
    yield of(completions, "one long number", '{"n":', "9", "}")
    yield of(completions, "one long fraction", '{"temperature":0.', "1", "}")
    yield of(completions, "duplicate keys", "{", '"n":1,', '"n":1}')
    yield of(completions, "spaces around", prompt + "1", " ", "}")
    yield of(completions, "long key", '{"', "k", '":1}')
    yield of(completions, "stop string", prompt + '"a","n":128,"stop":"', "ab", '"}')
    yield of(completions, "stop strings", prompt + '"a","stop":[', '"a",', '"a"]}')
    yield of(completions, "stop ids", prompt + '"a","stop_token_ids":[', "1,", "1]}")
    yield Body("many keys", completions, lambda: json.dumps({f"k{i}": i for i in range(500_000)}).encode())
    yield Body("logit_bias", completions, lambda: completion(
        prompt="a", logit_bias={str(i): 1 for i in range(500_000)}))
    yield of("/tokenize", "tokenize", '{"model":"m","prompt":"', "a~", '"}')
    yield of("/detokenize", "detokenize", '{"model":"m","tokens":[', "300,", "1]}")
    yield from _hostile_chats(of)
    # What is accepted, at its bounds.
    yield just("accepted: 2,048 prompts", prompt=["a"] * 2048)
    yield just("accepted: 64 prompts, n 32", prompt=["a"] * 64, n=32)
    yield just("accepted: prompt of the whole context, as ids", prompt=[300] * (context - 2))
    yield just("accepted: ids of many prompts", prompt=[[300] * 2000] * 130)
    yield just("accepted: n 128 of the whole context", prompt=[300] * (context - 2), n=128)
    yield just("accepted: 16 stop strings, n 128", prompt="a", n=128, stop=["a" * 255 + "b"] * 16, max_tokens=16)
    yield just("accepted: biases and stop ids, n 128", prompt="a", n=128, stop_token_ids=list(range(10, 266)),
               logit_bias={str(i): 1 for i in range(NUM_EMBEDDINGS)})
    yield just("accepted: scores of a prompt", prompt=[300] * 3000, prompt_logprobs=20, echo=True, logprobs=5)
    yield Body("accepted: 4,096 messages", chats, lambda: json.dumps(
        {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": ""}] * 4096}).encode())
    yield Body("accepted: 8,000 parts", chats, lambda: json.dumps(
        {"model": "m", "max_tokens": 2,
         "messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1000}] * 8}).encode())
    yield Body("accepted: tokenize, with names", "/tokenize", lambda: json.dumps(
        {"model": "m", "prompt": "~x" * 2**15, "return_token_strs": True}).encode())
    yield Body("accepted: detokenize", "/detokenize", lambda: json.dumps(
        {"model": "m", "tokens": [300] * 2**16}).encode())


def _hostile_chats(of: Callable[[str, str, str, str, str], Body]) -> Iterator[Body]:
    """Bodies of tools, schemas, grammars, and the other APIs of chats."""
    chats, responses, messages = "/v1/chat/completions", "/v1/responses", "/v1/messages"
    chat = '{"model":"m","messages":[{"role":"user","content":"a"}],'
    schema, end = chat + '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":', "}}}"
    yield of(chats, "message text: special tokens", '{"model":"m","messages":[{"role":"user","content":"',
             EOS, '"}]}')
    yield of(chats, "message text: halves of special tokens", '{"model":"m","messages":[{"role":"user","content":"',
             EOS[:5], '"}]}')
    yield of(chats, "tools: descriptions", chat + '"tools":[{"type":"function","function":{"name":"f","description":"',
             "a", '"}}]}')
    yield of(chats, "tools: properties", chat + '"tools":[{"type":"function","function":{"name":"f","parameters":{',
             '"a":{},', '"b":{}}}}]}')
    yield of(chats, "tools: an enum", chat + '"tools":[{"type":"function","function":{"name":"f","parameters":'
             '{"enum":[', '"a",', '"b"]}}}]}')
    yield of(chats, "tool calls", '{"model":"m","messages":[{"role":"assistant","tool_calls":[',
             '{"function":{"name":"f","arguments":"{}"}},', '{"function":{"name":"f"}}]}]}')
    yield of(chats, "tool call: arguments", '{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":'
             '{"name":"f","arguments":"{\\"a\\":[', "1,", '1]}"}}]}]}')
    yield of(chats, "tool call: objects", '{"model":"m","messages":[{"role":"assistant","tool_calls":[{"function":'
             '{"name":"f","arguments":"{\\"a\\":[', "{},", '{}]}"}}]}]}')
    yield of(chats, "schema: an enum", schema + '{"enum":[', '"a",', '"b"]}' + end)
    yield of(chats, "schema: deep", schema, '{"items":', "")
    yield of(chats, "regex", chat + '"guided_regex":"', "(a|b)*", '"}')
    yield of(chats, "choices", chat + '"guided_choice":[', '"ab",', '"ab"]}')
    yield of(chats, "grammar", chat + '"guided_grammar":"start: ', "a | ", 'a"}')
    yield of(responses, "responses: text", '{"model":"m","input":"', "a", '"}')
    yield of(responses, "responses: items", '{"model":"m","input":[', '{"role":"user","content":"a"},', "{}]}")
    yield of(responses, "responses: parts", '{"model":"m","input":[{"role":"user","content":[',
             '{"type":"input_text","text":"a"},', "{}]}]}")
    yield of(responses, "responses: arguments", '{"model":"m","input":[{"type":"function_call","arguments":"[',
             "1,", '1]"}]}')
    yield of(messages, "messages: blocks", '{"model":"m","max_tokens":2,"messages":[{"role":"user","content":[',
             '{"type":"text","text":"a"},', "{}]}]}")
    yield of(messages, "messages: results", '{"model":"m","max_tokens":2,"messages":[{"role":"user","content":['
             '{"type":"tool_result","tool_use_id":"a","content":[', '{"type":"text","text":"a"},', "{}]}]}]}")
    yield of(messages, "messages: input", '{"model":"m","max_tokens":2,"messages":[{"role":"assistant","content":['
             '{"type":"tool_use","id":"a","name":"f","input":{"a":[', '{},', "{}]}}]}]}")
    yield of(messages, "messages: input text", '{"model":"m","max_tokens":2,"messages":[{"role":"assistant","content":['
             '{"type":"tool_use","id":"a","name":"f","input":{"a":"', "a", '"}}]}]}')
    yield of(messages, "messages: system", '{"model":"m","max_tokens":2,"messages":[],"system":"', "a", '"}')
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(20)}}
    yield Body("accepted: 30 tools", chats, lambda: json.dumps(
        {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}], "tools": [
            {"type": "function", "function": {"name": f"f{i}", "description": "a " * 100, "parameters": parameters}}
            for i in range(30)]}).encode())
    for name, fields in _hard_formats().items():
        yield Body(f"format: {name}", chats, lambda fields=fields: json.dumps(       # type: ignore[misc]
            {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "a"}], **fields}).encode())


def _hard_formats() -> dict[str, dict[str, object]]:
    """Return formats within the bounds that are hard to compile."""
    nested: dict[str, object] = {"type": "string"}
    for _ in range(7):
        nested = {"anyOf": [nested, {"type": "object", "properties": {"a": nested}}]}
    return {
        "an enum of 60 kB": {"guided_json": {"enum": [f"{i:0100d}" for i in range(600)]}},
        "a thousand properties": {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}},
        "recursive": {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [
            {"type": "array", "items": {"$ref": "#/$defs/a"}}, {"type": "null"}]}}}},
        "alternatives of alternatives": {"guided_json": nested},
        "huge bounds": {"guided_json": {"type": "string", "minLength": 10**6, "maxLength": 10**9}},
        "huge arrays": {"guided_json": {"type": "array", "minItems": 10**6, "items": {"type": "integer"}}},
        "huge numbers": {"guided_json": {"type": "integer", "minimum": 7, "maximum": 10**30, "multipleOf": 123457}},
        "regex of repeats": {"guided_regex": "((a{0,1000}){0,1000}){0,1000}b"},
        "regex of many states": {"guided_regex": "(a|b)*a(a|b){20}"},
        "regex of intersections": {"guided_regex": "(a|aa|aaa)*" * 2000},
        "an ambiguous grammar": {"guided_grammar": "start: a\na: a a a a | \"x\" | "},
        "a grammar of many rules": {"guided_grammar": "start: r0\n" + "\n".join(
            f"r{i}: r{i + 1} r{i + 1} | r{i + 1}" for i in range(1500)) + '\nr1500: "x"'},
        "a grammar of repeats": {"guided_grammar": 'start: (("a"{1,1000}){1,1000}){1,1000}'},
    }


async def serve_shard(port: Synchronized[float], context: int, block_s: Synchronized[float]) -> None:
    """Run one shard until killed; its link's port goes into `port`."""
    servicer = ShardLinkServer("s0", time.monotonic)
    _, port.value = await start_link_server(servicer, "127.0.0.1:0")

    async def ring_nobody(step_index: int) -> None:
        pass

    scheduler = Scheduler(SchedulerConfig(block_size=BLOCK_SIZE), 4 * context // BLOCK_SIZE, context)
    engine = Engine(scheduler, OneTokenExecutor(), 1, time.monotonic, ring_nobody, servicer.deliver)
    servicer.serve(engine, NUM_EMBEDDINGS)
    await run_endless(engine=engine.run(), ticker=tick(block_s))


async def serve_router(listener: socket.socket, folder: Path, context: int, shard_port: Synchronized[float],
                       block_s: Synchronized[float]) -> None:
    """Serve until killed."""
    while not shard_port.value:     # noqa: ASYNC110
        await asyncio.sleep(0.01)
    facts = DeviceFacts("cpu", "stub", "stub", 1, 1)
    member = Member("s0", "default", "n0", "n0", f"127.0.0.1:{int(shard_port.value)}", facts)
    metrics, tokenizer = RouterMetrics(), Tokenizer.from_dir(folder)
    service = InferenceService(ModelCard("m", context, 0), tokenizer, RouterConfig(),
                               SchedulerConfig(block_size=BLOCK_SIZE), metrics, time.monotonic)
    service.set_epoch(Epoch(1, (member,), Placement(1, ()), "", SHARES))
    app = build_http_app(service, tokenizer, RouterConfig(), metrics.render)
    await HttpServer(app).start(listener)
    await run_endless(ticker=tick(block_s))


async def tick(block_s: Synchronized[float]) -> None:
    """Keep the longest time without a tick in `block_s`."""
    last_s = time.monotonic()
    while True:
        await asyncio.sleep(0.001)
        now_s = time.monotonic()
        block_s.value = max(block_s.value, now_s - last_s)
        last_s = now_s


@contextmanager
def process(work: Callable[[], Coroutine[None, None, None]]) -> Iterator[int]:
    """Run the work in a child until the block is left -> its process id."""
    child = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(work()), daemon=True)
    child.start()
    assert child.pid is not None
    try:
        yield child.pid
    finally:
        child.kill()
        child.join()


def resident_bytes(pid: int, key: str) -> int:
    """Return VmRSS, or VmHWM: its highest value since reset_peak()."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")


def post(port: int, path: str, content: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    try:
        connection.request("POST", path, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        while answer.read(1 << 20):
            pass
        return answer.status
    finally:
        connection.close()


def measure(body: Body, folder: Path, context: int) -> Cost:
    """Send one body to a new router and shard, after usual ones have woken all their parts."""
    content, port, blocks_s = body.make(), number(), (number(), number())
    with (socket.create_server(("127.0.0.1", 0)) as listener,
          process(lambda: serve_shard(port, context, blocks_s[1])) as shard_pid,
          process(lambda: serve_router(listener, folder, context, port, blocks_s[0])) as router_pid):
        pids, http_port = (router_pid, shard_pid), listener.getsockname()[1]
        for _ in range(3):
            assert post(http_port, "/v1/completions", completion(prompt="a " * 3000, n=2)) == 200
        before_bytes = [resident_bytes(pid, "VmRSS") for pid in pids]
        for pid, block_s in zip(pids, blocks_s, strict=True):
            reset_peak(pid)
            block_s.value = 0.0
        began_s = time.monotonic()
        status = post(http_port, body.path, content)
        answer_s = time.monotonic() - began_s
        peak, shard_peak = (max(0, resident_bytes(pid, "VmHWM") - before)
                            for pid, before in zip(pids, before_bytes, strict=True))
        return Cost(body.name, len(content), status, round(peak / 1e6, 1),
                    round(max(0.0, peak - FREE_BYTES) / len(content), 1), round(blocks_s[0].value * 1e3, 1),
                    round(shard_peak / 1e6, 1), round(blocks_s[1].value * 1e3, 1), round(answer_s, 2))


def number() -> Synchronized[float]:
    return multiprocessing.Value("d", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=32_768, help="max_model_len of the served model")
    parser.add_argument("--only", default="", help="names of bodies, by commas; parts of names count")
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    costs = []
    gc.freeze()         # as routers and shards do when they have started
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        writer = CheckpointWriter(folder, 1)
        write_tokenizer(writer)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        writer.add_json("tokenizer_config.json", config | {"chat_template": TOOLS_TEMPLATE + config["chat_template"]})
        writer.add_json("config.json", {"vocab_size": NUM_EMBEDDINGS, "eos_token_id": 0})
        print(ROW.format("body", "bytes", "status", "peak MB", "x bytes", "block ms", "shard MB", "block ms", "s"))
        for body in hostile_bodies(options.context):
            if not wanted or any(part in body.name for part in wanted):
                costs.append(cost := measure(body, folder, options.context))
                print(ROW.format(*astuple(cost)), flush=True)
    print(json.dumps({"benchmark": "bodies", **describe(), "context": options.context,
                      "worst_bytes_per_byte": max(cost.bytes_per_byte for cost in costs),
                      "worst_block_ms": max(cost.block_ms for cost in costs),
                      "bodies": [asdict(cost) for cost in costs]}))


if __name__ == "__main__":
    main()
