"""Record how a real vLLM renders prompts: ``python -m tests.support.render_capture OUT.jsonl``.

It makes the tiny model, starts ``vllm launch render`` on it with a template that shows whatever a template may see,
and writes one line for each body of ``BODIES``: the path, the body, what the router would ask ``/tokenize`` about it
(null where it claims nothing), the token ids of the answer, and those that vLLM makes of the body itself
(``PATH/render``). ``tests/golden/vllm/rendered.jsonl`` comes from here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from helios.errors import HeliosError
from helios.http.client import HttpClient
from helios.launch import vllm
from helios.launch.tiny_model import tiny_llama
from router.kv.tokens import prompt_of

MODEL: Final = "tiny"
START_S: Final = 300.0
TEMPLATE: Final = """\
{%- for message in messages %}<{{ message.role }}{% if message.name %}|{{ message.name }}{% endif %}>
{%- if message.reasoning_content %}(thought: {{ message.reasoning_content }}){% endif %}{{ message.content }}
{%- endfor %}
{%- if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}
{%- if reasoning_effort is defined %}[effort {{ reasoning_effort }}]{% endif %}
{%- if style is defined %}[style {{ style }}]{% endif %}
{%- if documents %}[documents {{ documents | tojson }}]{% endif %}
{%- if tools %}[tools {{ tools | tojson }}]{% endif %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
USER: Final = {"role": "user", "content": "Tell me of Ägypten."}
THOUGHT: Final = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "a river"}]}
SAID: Final = {
    "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "It has a river.", "annotations": []}],
}  # fmt: skip
FUNCTION: Final = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}


def _text(*texts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": text} for text in texts]


def _messages(*messages: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return MESSAGES, {"max_tokens": 2048, "messages": messages or (USER,), **fields}


BODIES: Final[list[tuple[str, dict[str, Any]]]] = [
    (CHAT, {"messages": [USER]}),
    (CHAT, {"messages": [USER], "reasoning_effort": "none", "chat_template_kwargs": {"style": "terse"}}),
    (CHAT, {"messages": [USER], "reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"messages": [USER], "documents": [{"title": "t", "text": "d"}]}),
    (RESPONSES, {"input": "Hello"}),
    (RESPONSES, {"input": "Hello", "instructions": "Be short.", "store": False, "max_output_tokens": 9}),
    (RESPONSES, {"input": "Hello", "reasoning": {"effort": "low"}, "chat_template_kwargs": {"style": "terse"}}),
    (RESPONSES, {"input": [USER, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "More"}]}),
    (RESPONSES, {"input": [{"type": "message", "role": "developer", "content": "Short."}, USER], "tools": []}),
    (RESPONSES, {"input": [{"role": "user", "content": _text("one", "two", kind="input_text")}]}),
    (RESPONSES, {"input": [USER, THOUGHT, SAID, USER], "instructions": "Be short."}),
    (RESPONSES, {"input": [USER, SAID, SAID, USER]}),
    (RESPONSES, {"input": [USER, {**SAID, "status": "incomplete"}]}),
    (RESPONSES, {"input": "Hello", "tools": [FUNCTION]}),
    (RESPONSES, {"input": [USER, {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}]}),
    _messages(),
    _messages(system="Be short."),
    _messages(system=_text("x-anthropic-billing-header: 1", "Be short.", " Be kind.")),
    _messages({"role": "user", "content": _text("one")}, SAID | {"content": "Yes."}, USER),
    _messages({"role": "user", "content": _text("one", "", "two")}),
    _messages(
        USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, *_text("Yes.")]},
        USER,
    ),
    _messages(USER, {"role": "assistant", "content": "It has"}),
    _messages(thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "low"}),
    _messages(thinking={"type": "adaptive"}, chat_template_kwargs={"style": "terse"}),
    _messages(thinking={"type": "disabled"}),
    _messages(USER, {"role": "system", "content": "Now be long."}, USER),
    _messages(tools=[{"name": "f", "input_schema": {"type": "object"}}]),
    _messages(output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}}),
]
"""Requests without their model."""


def _post(client: HttpClient, path: str, body: bytes) -> Any:
    with client.request("POST", path, body=body, headers={"content-type": "application/json"}) as response:
        return json.loads(response.read())


def _line(client: HttpClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    content = json.dumps({"model": MODEL, **body}).encode()
    prompt = prompt_of(path, content)
    question = None if prompt is None else json.loads(prompt.question)
    tokens = None if prompt is None else _post(client, "/tokenize", prompt.question)["tokens"]
    rendered = _post(client, f"{path}/render", content)["token_ids"]
    return {"path": path, "body": json.loads(content), "question": question, "tokens": tokens, "rendered": rendered}


def _ready(client: HttpClient, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            client.json("GET", "/v1/models")
        except (HeliosError, OSError):
            time.sleep(1)
        else:
            return
    raise TimeoutError("vllm launch render does not answer")


def main(out: str) -> None:
    with tempfile.TemporaryDirectory() as base:
        template = Path(base) / "template.jinja"
        template.write_text(TEMPLATE)
        with vllm.reserved_port() as port:
            command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "launch", "render"]
            command += [str(tiny_llama(Path(base))), "--served-model-name", MODEL, "--port", str(port)]
            command += ["--host", "127.0.0.1", "--chat-template", str(template)]
            command += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
            process = subprocess.Popen(command)
        client = HttpClient(f"http://127.0.0.1:{port}", timeout_s=60)
        try:
            _ready(client, process)
            lines = [_line(client, path, body) for path, body in BODIES]
        finally:
            client.close()
            process.terminate()
            process.wait(60)
    Path(out).write_text("".join(json.dumps(one, separators=(",", ":")) + "\n" for one in lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
