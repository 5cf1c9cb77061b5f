"""The apps' parts without a page: what is shown, what is kept, where sentences end, how an answer is made."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from chat_templates import TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from octavo import AsyncLLM, RequestError, SamplingParams, StructuredOutputsParams
from octavo_apps.answering import Answer
from octavo_apps.conversation import Conversation, Turn
from octavo_apps.detection import Guess, detect
from octavo_apps.engines import Engines
from octavo_apps.languages import language, large
from octavo_apps.markdown import defused, fused
from octavo_apps.translation import LONGEST, Sentence, Translation

# -- Markdown --------------------------------------------------------------------------------------------------------

WRITTEN = st.lists(
    st.sampled_from(
        ["<b>", "</b>", "<img src=x>", "![a](b)", "`", "``", "```", "~~~", "\n", "\n\n", "    ", " ", "&lt;", "&", "<",
         "text", "# ", "- ", "> ", "\\", "<!-- ", "<script>", "[x](y)"]
    )
).map("".join)  # fmt: skip


@given(WRITTEN)
def test_defusing_can_be_undone(text: str) -> None:
    assert fused(defused(text)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a < b && c", "a < b && c"),
        ("<b>x</b>", "&lt;b>x&lt;/b>"),
        ("`<b>` <b>", "`<b>` &lt;b>"),
        ("``a ` <b>`` <b>", "``a ` <b>`` &lt;b>"),
        ("`open <b>", "`open &lt;b>"),
        ("```\n<b>\n```\n<b>", "```\n<b>\n```\n&lt;b>"),
        ("```html\n<b> is not closed yet", "```html\n<b> is not closed yet"),
        ("~~~~\n```\n<b>\n~~~~\n<b>", "~~~~\n```\n<b>\n~~~~\n&lt;b>"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("![x](http://y/z.png)", "!\u200b[x](http://y/z.png)"),
    ],
)
def test_html_and_pictures_are_defused_outside_of_code(text: str, shown: str) -> None:
    assert defused(text) == shown


@given(st.lists(st.sampled_from(["<b>", "<img src=x>", "![a](b)", "\n\n", " ", "text", "# ", "- ", "<!-- "])))
def test_what_is_defused_renders_without_html_and_pictures(parts: list[str]) -> None:
    tokens = MarkdownIt("commonmark").parse(defused("".join(parts)))
    kinds = {child.type for token in tokens for child in [token, *(token.children or ())]}
    assert not kinds & {"html_block", "html_inline", "image"}


# -- conversations ---------------------------------------------------------------------------------------------------


def talk() -> Conversation:
    conversation = Conversation()
    conversation.ask("One")
    conversation.turns.append(Turn("assistant", "1", thinking="hm"))
    conversation.ask("Two <b>")
    conversation.turns.append(Turn("assistant", "2"))
    return conversation


def test_a_conversation_is_kept_and_read_again() -> None:
    conversation = talk()
    assert Conversation.from_json(conversation.to_json()) == conversation
    assert conversation.title == "One"
    assert "## You\n\nTwo <b>" in conversation.to_markdown()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"id": 1}', '{"id": "a", "system": "", "changed": 1, "turns": [{"role": "system"}]}',
     '{"id": "a", "system": "", "changed": 1, "turns": [{"role": "user", "content": 3}]}',
     '{"id": "a", "system": "", "changed": "x", "turns": []}'],
)  # fmt: skip
def test_what_is_no_conversation_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        Conversation.from_json(text)


def test_editing_finds_its_turn_behind_thoughts() -> None:
    conversation = talk()
    shown = conversation.shown()
    assert [message["content"] for message in shown] == ["One", "hm", "1", "Two &lt;b>", "2"]
    conversation.edit(3, "Three &lt;b>")
    assert [turn.content for turn in conversation.turns] == ["One", "1", "Three <b>"]
    assert conversation.undo() == "Three <b>"
    assert conversation.undo() == "One"
    assert conversation.undo() == ""


def test_a_failed_answer_and_its_question_are_not_shown_to_the_model() -> None:
    conversation = talk()
    conversation.system = "Be short."
    conversation.turns[-1].content = ""
    conversation.ask("Three")
    assert [message["content"] for message in conversation.messages()] == ["Be short.", "One", "1", "Three"]


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_thoughts_are_told_from_the_answer(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thinker"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATES["opened"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    form = StructuredOutputsParams(regex=r"ab cd</think>\n\nef gh")
    async with AsyncLLM(str(folder), dtype="float32", num_blocks=65) as llm:
        conversation = Conversation()
        conversation.ask("Hello")
        answer = Answer(conversation, SamplingParams(max_tokens=60, structured_outputs=form))
        moments = [moment async for moment in answer.run(llm)]
        assert (answer.turn.thinking, answer.turn.content) == ("ab cd", "ef gh")
        assert moments[-1].stats is not None
        assert moments[-1].metrics.output_tokens > 0
        assert conversation.messages()[-1] == {"role": "assistant", "content": "ef gh"}
        assert llm.stats().blocks_used == 0


async def test_old_turns_make_way_and_what_cannot_fit_is_refused(tiny_model: Path) -> None:
    async with AsyncLLM(str(tiny_model), dtype="float32", num_blocks=65, max_model_len=256) as llm:
        conversation = Conversation()
        for number in range(12):
            conversation.ask(f"Question number {number}")
            answer = Answer(conversation, SamplingParams(max_tokens=8, seed=1, ignore_eos=True))
            async for _ in answer.run(llm):
                pass
        assert answer.forgotten > 0
        assert answer.turn in conversation.turns
        for text, says in (("x" * 5000, "5,000 characters"), ("word " * 200, "shorten it")):
            conversation.ask(text)
            with pytest.raises(RequestError, match=says):
                async for _ in Answer(conversation, SamplingParams()).run(llm):
                    pass
            assert conversation.turns.pop().content == text, "nothing was added"


async def test_engines_stay_while_they_are_used_and_two_while_they_are_not(tiny_model: Path, tmp_path: Path) -> None:
    models = [str(tiny_model)]
    for number in range(3):
        shutil.copytree(tiny_model, tmp_path / str(number))
        models.append(str(tmp_path / str(number)))
    engines = Engines(models[0], dtype="float32", num_blocks=33)
    async with engines.use(models[0]) as first:
        for model in models[1:]:
            async with engines.use(model) as llm:
                await llm.generate([5, 6], SamplingParams(max_tokens=2))
        assert [engines.is_loaded(model) for model in models] == [True, False, False, True]
        await first.generate([5, 6], SamplingParams(max_tokens=2))
        first.engine.service.close()
    async with engines.use(models[0]) as again:
        await again.generate([5, 6], SamplingParams(max_tokens=2))
    engines.close()
    await asyncio.sleep(0)


# -- sentences and languages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        ("en", "Dr. Smith came at 3 p.m. to the house! Really?", ["Dr. Smith came at 3 p.m. to the house!", "Really?"]),
        ("en", " One.\n\nTwo and three.  Six\n", ["One.", "Two and three.", "Six"]),
        ("ja", "こんにちは。元気ですか？はい！", ["こんにちは。", "元気ですか？", "はい！"]),
        ("de", "Das kostet 3.50 Euro, d.h. wenig. Er kam am 5. Mai.", ["Das kostet 3.50 Euro, d.h. wenig.",
         "Er kam am 5. Mai."]),
        ("hi", "यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("aka_Latn", "", []), ("fr", " \n ", []), ("zh-Hant", "no end", ["no end"]),
    ],
)  # fmt: skip
def test_where_sentences_end(code: str, text: str, found: list[str]) -> None:
    assert [one.source for one in Translation.of(text, code, "fr").sentences] == found


@given(st.text(st.sampled_from("ab .!?\n,。\t"), max_size=3000))
def test_sentences_lose_nothing(text: str) -> None:
    translation = Translation.of(text, "en", "de")
    assert translation.original == text
    assert all(one.source == one.source.strip() and len(one.source) <= LONGEST for one in translation.sentences)
    for one in translation.sentences:
        one.text = one.source
    assert translation.text == text
    assert Translation.from_json(translation.to_json()) == translation


def test_what_is_no_translation_is_a_value_error() -> None:
    good = json.loads(Translation("a", "de", "en", [Sentence("", "Hallo", "Hello")]).to_json())
    for change in ({"sentences": 3}, {"source": 3}, {"changed": "x"}, {"more": 1}, {"sentences": [{"x": 1}]}):
        with pytest.raises(ValueError):
            Translation.from_json(json.dumps(good | change))
    with pytest.raises(ValueError):
        Translation.from_json("[]")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "Where is the station?"), ("de", "Wo ist der Bahnhof?"), ("fr", "Où est la gare ?"),
        ("es", "¿Dónde está la estación?"), ("ru", "Где находится станция?"), ("ja", "駅はどこですか。"),
        ("zh", "车站在哪里?"), ("ar", "أين المحطة؟"), ("sv", "Var ligger stationen?"), ("pl", "Gdzie jest stacja?"),
        ("ja", "ありがとう"), ("el", "Ευχαριστώ"), ("ko", "감사합니다"), ("tr", "Teşekkür ederim"),
        ("en", "How are you?"),
    ],
)  # fmt: skip
def test_languages_are_detected(code: str, text: str) -> None:
    guess = detect(text, large())
    assert guess is not None
    assert (guess.found.code, guess.sure) == (code, True)


@pytest.mark.parametrize(
    "text",
    ["OK", "Internet", "Berlin", "Merci !", "chat", "Hallo", "Danke", "Hello", "table", "Hola", "Ciao", "Hej", "Привет",
     "Bom dia", "Le titre", "A", "né"],
)  # fmt: skip
def test_a_word_or_two_are_not_sure(text: str) -> None:
    guess = detect(text, large())
    assert guess is not None
    assert not guess.sure
    assert len({guess.found, *guess.near}) == 3


def test_detection_keeps_to_the_languages_of_the_model() -> None:
    """What two languages share is in the one that the model reads; what is surely in another is not."""
    assert detect("Buenos días", large()) == Guess(language("es"), False, [language("gl"), language("pt")])
    assert detect("Buenos días", [language("gl"), language("zh")]) == Guess(language("gl"), True, [language("zh")])
    assert detect("table", [language("fr"), language("en")]) == Guess(language("fr"), False, [language("en")])
    assert detect("Danke", [language("de"), language("fr")]) == Guess(language("de"), True, [language("fr")])
    french = detect("Le chat est sur la table.", [language("en")])
    assert french == Guess(language("fr"), True)
    chinese = detect("车站在哪里?", [language("zh-Hant"), language("zh")])
    assert chinese == Guess(language("zh"), True)
    assert detect("Danke", [language("kbp")]) == Guess(language("da"), False)


def test_a_text_without_letters_is_in_no_language() -> None:
    assert detect("12 + 3 = 15!", large()) is None


def test_the_large_languages_have_names() -> None:
    assert len(large()) == len({one.name for one in large()}) == 60
    assert {"Filipino", "Norwegian", "Chinese", "Persian"} < {one.name for one in large()}
