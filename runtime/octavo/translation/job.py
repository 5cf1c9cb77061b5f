"""A call of `translate`: texts become sentences, sentences become prompts, and what comes back becomes texts again with
every blank where it was. Used by `LLM.translate` and `AsyncLLM.translate`; runs nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.errors import RequestError
from octavo.outputs import RequestOutput, TranslationOutput
from octavo.sampling_params import SamplingParams
from octavo.texts import checked_texts
from octavo.translation.languages import Language, language_name, parse
from octavo.translation.sentences import Sentence, cut, shortened

if TYPE_CHECKING:
    from octavo.client import Client

CHAT_PROMPT = (
    "Translate the following text{source} into {target}. Answer with the translation only, without notes or quotation "
    "marks.\n\n{text}"
)
"""For models that chat."""
MAX_TOKENS = 256
"""Of a sentence, where `max_tokens` is not given and the model's length allows it."""


@dataclass(slots=True)
class TranslationJob:
    """`prompts`: one for each sentence to be translated, in order. `texts`: for each text its sentences, and for each
    of these the place of its prompt, or None where there is nothing to translate."""

    params: SamplingParams
    chats: bool
    originals: list[str]
    prompts: list[Any] = field(default_factory=list)
    texts: list[list[tuple[Sentence, int | None]]] = field(default_factory=list)

    def outputs(self, found: Sequence[RequestOutput | BaseException]) -> list[TranslationOutput | BaseException]:
        """For each text its translation, or the first error among its sentences. `found`: of all prompts."""
        return [self._output(number, found) for number in range(len(self.texts))]

    def _output(self, number: int, found: Sequence[RequestOutput | BaseException]) -> TranslationOutput | BaseException:
        parts: list[str] = []
        used: list[RequestOutput] = []
        for sentence, place in self.texts[number]:
            if place is None:
                parts.append(sentence.whole)
                continue
            output = found[place]
            if isinstance(output, BaseException):
                return output
            used.append(output)
            parts.append(sentence.before + output.text.strip() + sentence.after)
        return TranslationOutput("".join(parts), self.originals[number], used)

    def pieces(self, place: int, text: str) -> str:
        """What a stream of one text gives when the sentence of prompt `place` is there: the sentence and the blanks
        up to the next one."""
        sentences = self.texts[0]
        at = next(n for n, (_, found) in enumerate(sentences) if found == place)
        found = (self.leading() if place == 0 else "") + sentences[at][0].before + text.strip() + sentences[at][0].after
        for sentence, following in sentences[at + 1 :]:
            if following is not None:
                break
            found += sentence.whole
        return found

    def leading(self) -> str:
        """What stands in front of the first sentence."""
        found = ""
        for sentence, place in self.texts[0]:
            if place is not None:
                break
            found += sentence.whole
        return found


def plan_translation(
    client: Client, texts: object, source: object, target: object, *, max_tokens: int | None, beam_width: int | None,
    sampling_params: SamplingParams | None,
) -> TranslationJob:  # fmt: skip
    """Check everything and cut the texts. Raises `RequestError` that names the argument."""
    batch = checked_texts(texts)
    params = _params(client, sampling_params, max_tokens, beam_width)
    scheme = client.engine.scheme
    if scheme is None:
        return _chat_job(client, batch, source, target, params)
    codes = scheme.languages(source, target)
    known = Language.of(codes[0]) if codes[0] else None
    longest = client.engine.limits.max_model_len

    def fits(text: str) -> bool:
        return len(scheme.source_ids(text, *codes)) <= longest

    job = TranslationJob(params, False, batch)
    for text in batch:
        job.texts.append([])
        for whole in cut(text, known.code if known else "en"):
            for sentence in [whole] if not whole.text or fits(whole.text) else shortened(whole, fits):
                place = None
                if sentence.text:
                    place = len(job.prompts)
                    ids = scheme.source_ids(sentence.text, *codes)
                    decoder = scheme.prompt_ids(codes[1])
                    job.prompts.append(
                        {"prompt": sentence.text, "prompt_token_ids": ids, "decoder_prompt_token_ids": decoder}
                    )
                job.texts[-1].append((sentence, place))
    return job


def _chat_job(client: Client, batch: list[str], source: object, target: object, params: SamplingParams) -> (
    TranslationJob
):  # fmt: skip
    """By a model that chats: paragraph by paragraph, as such a model makes better use of what stands around."""
    if target is None:
        raise RequestError("the target language must be given", "target")
    given = _named(source, "source") if source is not None else ""
    into = _named(target, "target")
    job = TranslationJob(params, True, batch)
    for text in batch:
        job.texts.append([])
        for line in text.splitlines(keepends=True):
            stripped = line.strip()
            begin = line.index(stripped) if stripped else len(line)
            sentence = Sentence(line[:begin], stripped, line[begin + len(stripped) :])
            place = None
            if stripped:
                place = len(job.prompts)
                ask = CHAT_PROMPT.format(source=f" from {given}" if given else "", target=into, text=stripped)
                job.prompts.append(client.chat_prompt([{"role": "user", "content": ask}], {}))
            job.texts[-1].append((sentence, place))
    return job


def _named(name: object, field: str) -> str:
    found = parse(name, field)
    return language_name("-".join(part for part in (found.code, found.script, found.region) if part))


def _params(
    client: Client, given: SamplingParams | None, max_tokens: int | None, beam_width: int | None
) -> SamplingParams:
    if given is not None and max_tokens is not None:
        raise RequestError("give max_tokens in sampling_params, or without them", "max_tokens")
    if given is not None and beam_width is not None:
        raise RequestError("give beam_width in sampling_params, or without them", "beam_width")
    if given is not None and not isinstance(given, SamplingParams):
        raise RequestError(f"sampling_params must be SamplingParams, not {type(given).__name__}", "sampling_params")
    tokens = MAX_TOKENS if max_tokens is None else max_tokens
    params = given or SamplingParams(
        temperature=0.0, max_tokens=tokens, use_beam_search=beam_width is not None, beam_width=beam_width
    )
    client.engine.check_generates()
    return params
