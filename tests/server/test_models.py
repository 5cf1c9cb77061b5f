"""Several models behind one port: names, loading on demand, and who goes when there is no room."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.errors import ApiError
from octavo.server.models import Models, default_name, load, served_models
from tiny_models import make_model  # type: ignore[import-not-found]

ENGINE = {"device": "cpu", "num_blocks": 16, "block_size": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [str(make_model("llama-head-dim", tmp_path_factory.mktemp(name))) for name in ("a", "b", "c")]


class Counted:
    """Loads really, and remembers what."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __call__(self, config: EngineConfig) -> AsyncLLM:
        self.loaded.append(config.model)
        return load(config)


async def use(models: Models, name: str | None) -> str:
    async with models.use(name) as loaded:
        [output] = await loaded.llm.generate([[70, 71]])
        assert output.finished
        return loaded.name


async def test_loaded_once_when_first_asked_for(folders: list[str]) -> None:
    counted = Counted()
    models = Models(served_models(folders, ["a,alias", "b", "c"], ENGINE), load=counted)
    assert not counted.loaded
    assert await asyncio.gather(*(use(models, name) for name in ("a", "alias", "a", None))) == ["a"] * 4
    assert counted.loaded == [folders[0]]
    assert [card["id"] for card in models.listing()] == ["a", "alias", "b", "c"]
    assert models.card("alias")["root"] == "a"
    with pytest.raises(ApiError) as missing:
        await use(models, "d")
    assert missing.value.status == 404
    await models.close()


async def test_the_one_used_longest_ago_makes_room(folders: list[str]) -> None:
    counted = Counted()
    served = served_models(folders, ["a", "b", "c"], ENGINE)
    trial = Models(served)
    one = (await trial.get(served[0])).bytes
    await trial.close()
    models = Models(served, memory=int(2.5 * one), load=counted)
    for name in ("a", "b", "a", "c"):
        await use(models, name)
    assert {loaded.name for loaded in models.loaded()} == {"a", "c"}
    await use(models, "b")
    assert {loaded.name for loaded in models.loaded()} == {"b", "c"}
    assert counted.loaded == [folders[place] for place in (0, 1, 2, 1)]
    await models.close()


async def test_a_model_in_use_stays(folders: list[str]) -> None:
    models = Models(served_models(folders, ["a", "b", "c"], ENGINE), memory=1)
    async with models.use("a") as held:
        assert await use(models, "b") == "b"
        [output] = await held.llm.generate([[70]])
        assert output.finished
    await models.close()


async def test_an_engine_that_broke_is_made_anew(folders: list[str]) -> None:
    counted = Counted()
    models = Models(served_models(folders[:1], ["a"], ENGINE), load=counted)
    await use(models, "a")
    models.loaded()[0].llm.engine.service.close()
    assert not models.ready(models.all)
    await use(models, "a")
    assert len(counted.loaded) == 2
    assert models.ready(models.all)
    await models.close()


async def test_a_model_that_cannot_be_loaded_is_asked_for_again(tmp_path: Path) -> None:
    models = Models(served_models([str(tmp_path / "none")], ["a"], {}))
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            await use(models, "a")
    await models.close()


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "c"], [" , "]])
def test_names_that_cannot_be(folders: list[str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        Models(served_models(folders[:2], names, {}))
    assert refused.value.field == "served_model_name"


def test_a_path_is_nobodys_business(folders: list[str]) -> None:
    assert default_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert default_name(folders[0]) == Path(folders[0]).name
    assert default_name("./models/x.gguf") == "x.gguf"
