"""Prompt files: every accepted form, and each mistake with its one message."""

import json
import os
import pathlib

import pytest

from experiments import prompts


def load(path, *, chat):
    """The prompts alone."""
    return [line.prompt for line in prompts.load_prompts(str(path), chat=chat)]


def test_built_in_prompts_are_chats():
    found = load("", chat=True)
    assert len(found) >= 4
    assert all(chat[0]["role"] == "user" and chat[0]["content"] for chat in found)


def test_prompt_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("first\n\n second \n")
    assert load(text, chat=False) == ["first", " second "]
    assert load(text, chat=True)[0] == prompts.as_chat("first")
    lines = tmp_path / "a.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    values = ["plain", {"prompt": "p", "id": 3}, {"messages": chat}, {"token_ids": [1]}]
    lines.write_text("\n".join(map(json.dumps, values)))
    assert load(lines, chat=False) == ["plain", "p", chat, [1]]
    assert load(lines, chat=True)[2:] == [chat, [1]]


def test_the_example_file_is_one_of_each_kind():
    path = pathlib.Path(prompts.__file__).with_name("example_prompts.jsonl")
    found = prompts.load_prompts(str(path), chat=False)
    assert [type(line.prompt) for line in found] == [str, list, str]
    assert [line.rest["id"] for line in found] == ["sea", "sky", "product"]


def test_what_a_line_says_beside_its_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    parts = [{"role": "user", "content": [{"type": "text", "text": "u"}]}]
    values = [
        {"messages": parts, "chat_template_kwargs": {"a": 1, "b": 2}, "id": "x"},
        {"prompt": "p", "answer": [1, {"b": None}], "id": 7},
        "plain",
    ]
    path.write_text("\n".join(map(json.dumps, values)))
    found = prompts.load_prompts(str(path), chat=True, chat_template_kwargs={"b": 3})
    assert [line.prompt for line in found] == [
        parts, prompts.as_chat("p"), prompts.as_chat("plain")
    ]  # fmt: skip
    assert [line.chat_template_kwargs for line in found] == [
        {"a": 1, "b": 2}, {"b": 3}, {"b": 3}
    ]  # fmt: skip
    rests = [{"id": "x"}, {"answer": [1, {"b": None}], "id": 7}, {}]
    assert [line.rest for line in found] == rests
    found = prompts.load_prompts(str(path), chat=False)
    assert [line.chat_template_kwargs for line in found] == [
        {"a": 1, "b": 2},
        None,
        None,
    ]


BAD_LINES = {
    "{": "is not JSON",
    "3": "must be a string or an object",
    "{}": "must be a string or an object",
    '{"prompt": "a", "token_ids": [1]}': "must be a string or an object",
    '{"prompt": ""}': "prompt is empty",
    '{"prompt": 3}': "prompt is empty or of the wrong type",
    '{"messages": []}': "messages is empty",
    '{"messages": [{"role": "user"}]}': "message 0 of the chat: 'content' must be",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': (
        "message 0 of the chat, part 0: 'content' parts must be .*image_url"
    ),
    '{"messages": {"role": "user", "content": "a"}}': "messages is .* the wrong type",
    '{"prompt": "a", "chat_template_kwargs": []}': "kwargs must be an object",
    '{"prompt": "a", "tools": []}': "put tools into chat_template_kwargs",
    '{"token_ids": []}': "token_ids is empty",
    '{"token_ids": [1, true]}': "token_ids is empty or of the wrong type",
    '{"token_ids": [-1]}': "token_ids is empty or of the wrong type",
    '{"token_ids": "12"}': "token_ids is empty or of the wrong type",
    '{"prompt": "a", "prompt": "b"}': "the key 'prompt' is there twice",
    '{"messages": [{"role": "user", "content": "a", "role": "b"}]}': "'role' is there",
    '{"token_ids": [NaN]}': "NaN is no JSON number",
    '{"prompt": "a", "weight": -Infinity}': "-Infinity is no JSON number",
    r'"a\ud800b"': r"prompt holds \\ud800, half of a surrogate pair",
    r'{"messages": [{"role": "user", "content": "\udfff"}]}': r"holds \\udfff, half",
    "[" * 100_000: "is nested too deeply",
    '"a\0b"': "is not JSON",
}


@pytest.mark.parametrize(
    "line, message", BAD_LINES.items(), ids=lambda text: ascii(text[:40])
)
def test_bad_prompt_lines_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'"good"\n\n{line}\n')
    with pytest.raises(ValueError, match=rf"bad\.jsonl:3.*{message}"):
        prompts.load_prompts(str(path), chat=True)


def test_bad_prompt_files(tmp_path):
    def fails(name, message, data=None):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            prompts.load_prompts(str(tmp_path / name), chat=True)

    fails("missing.txt", "cannot read .*No such file")
    fails("a.csv", "must end in .txt or .jsonl", b"x")
    fails("empty.txt", "holds no prompt", b"\n \n")
    fails("latin.txt", "latin.txt:2 is not UTF-8", b"ok\ncaf\xe9\n")
    fails("utf16.txt", "utf16.txt:1 holds a NUL byte", "hi\n".encode("utf-16-le"))
    (tmp_path / "folder.jsonl").mkdir()
    fails("folder.jsonl", "cannot read .*Is a directory")
    if os.geteuid():  # root reads everything
        (tmp_path / "secret.txt").touch(mode=0)
        fails("secret.txt", "cannot read .*Permission denied")


# What Python takes for the end of a line, and nobody who writes such a file does.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_end_at_a_line_feed_only(tmp_path, mark, end):
    texts = [f"one{c}prompt" for c in SEPARATORS] + ["last\u2028"]
    text = tmp_path / "a.txt"
    text.write_bytes(mark + end.join(texts).encode())
    assert load(text, chat=False) == texts
    # As they are, where JSON has no need to escape them.
    texts = [t for t in texts if not any(ord(c) < 0x20 for c in t)]
    lines = tmp_path / "a.jsonl"
    written = [json.dumps(t, ensure_ascii=False) for t in texts]
    lines.write_bytes(mark + end.join([*written, ""]).encode())
    assert load(lines, chat=False) == texts


def test_escaped_characters_of_json_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'"\ud83d\ude00 \u0000 \u2028"' + "\n")
    assert load(path, chat=False) == ["\U0001f600 \0 \u2028"]
