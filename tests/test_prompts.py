"""Prompt files: every accepted form, and each mistake with its one message."""

import json

import pytest

from experiments import prompts


def test_built_in_prompts_are_chats():
    found = prompts.load_prompts("", chat=True)
    assert len(found) >= 4
    assert all(chat[0]["role"] == "user" and chat[0]["content"] for chat in found)


def test_prompt_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("first\n\n second \n")
    assert prompts.load_prompts(str(text), chat=False) == ["first", " second "]
    assert prompts.load_prompts(str(text), chat=True)[0] == prompts.as_chat("first")
    lines = tmp_path / "a.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    values = ["plain", {"prompt": "p", "id": 3}, {"messages": chat}, {"token_ids": [1]}]
    lines.write_text("\n".join(map(json.dumps, values)))
    assert prompts.load_prompts(str(lines), chat=False) == ["plain", "p", chat, [1]]
    assert prompts.load_prompts(str(lines), chat=True)[2:] == [chat, [1]]


BAD_LINES = {
    "{": "is not JSON",
    "3": "must be a string or an object",
    "{}": "must be a string or an object",
    '{"prompt": "a", "token_ids": [1]}': "must be a string or an object",
    '{"prompt": ""}': "prompt is empty",
    '{"prompt": 3}': "prompt is empty or of the wrong type",
    '{"messages": []}': "messages is empty",
    '{"messages": [{"role": "user"}]}': "messages is empty or of the wrong type",
    '{"token_ids": []}': "token_ids is empty",
    '{"token_ids": [1, true]}': "token_ids is empty or of the wrong type",
    '{"token_ids": [-1]}': "token_ids is empty or of the wrong type",
    '{"token_ids": "12"}': "token_ids is empty or of the wrong type",
}


@pytest.mark.parametrize("line, message", BAD_LINES.items())
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
    fails("latin.txt", "not UTF-8", b"caf\xe9\n")
