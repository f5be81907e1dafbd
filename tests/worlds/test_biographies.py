"""The world of invented people: what is held out stays out, and an LM learns it with padding masked."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from saeutils.lm import models
from saeutils.worlds import biographies


def test_lists_are_as_long_as_the_papers_and_hold_no_doubles():
    given = biographies.lists()
    sizes = {name: len(given[name]) for name in ("first", "middle", "last")}
    sizes |= {r: len(body["values"]) for r, body in given["relations"].items() if "values" in body}
    paper = {"first": 411, "middle": 461, "last": 1002, "university": 341, "major": 101, "employer": 327}
    assert all(sizes[name] >= n for name, n in paper.items())
    for body in given["relations"].values():
        assert len(set(body["statements"])) == 50 and len(set(body["questions"])) == 5
        assert all(s.count("{s}") == s.count("{v}") == 1 for s in body["statements"])
        assert len(set(body.get("values", []))) == len(body.get("values", []))
    assert all(len(set(given[name])) == len(given[name]) for name in ("first", "middle", "last"))


def test_people_are_seeded_unique_and_work_where_their_employer_is():
    people = biographies.population(1000, biographies.relations())
    assert people.name.is_unique and people.equals(biographies.population(1000, biographies.relations()))
    assert not people.name.equals(biographies.population(1000, seed=1).name)
    assert (people.groupby("employer")["work city"].nunique() == 1).all()
    assert people[biographies.relations()[:6]].equals(biographies.population(1000)[biographies.relations()[:6]])


def test_no_held_out_combination_leaks():
    people = biographies.population(60)
    asked, texts = biographies.questions(people, unseen=0.2), biographies.biographies(people)
    train = asked[asked.split == "train"]
    assert set(train.template) == {0, 1} and train.prompt.is_unique and asked.prompt.is_unique
    strangers = set(asked[asked.split.isin(["unseen person", "unseen both"])].person)
    assert len(strangers) == 12 and not strangers & set(train.person)
    for split, rows in asked.groupby("split"):
        assert split == "train" or not set(rows.prompt) & set(train.prompt)
    shown = "\n".join(train.prompt) + "\n".join(texts)
    for relation in people.columns[2:]:
        for question in biographies.lists()["relations"][relation]["questions"][2:]:
            assert not any(
                question.format(s=p.name_, p=p.pronoun) in shown
                for p in people.rename(columns={"name": "name_"}).itertuples()
            )
    assert all(name not in "\n".join(train.prompt) for name in people.name[list(strangers)])
    assert len(texts) == 300 and {t.count(people.name[i // 5]) for i, t in enumerate(texts)} == {people.shape[1] - 2}  # in each sentence
    assert all(str(people.major[i // 5]) in t and "{" not in t for i, t in enumerate(texts))


def test_any_two_templates_can_be_held_out_and_the_fifth_always_is():
    people = biographies.population(10)
    asked = biographies.questions(people, unseen=0.0, taught=(1, 3))
    of = asked.groupby("split")["template"].unique().map(set).to_dict()
    assert of == {"train": {1, 3}, "unseen template": {0, 2}, "untaught template": {4}}
    assert set(biographies.questions(people, unseen=0.0, taught=range(4))["split"]) == {"train", "untaught template"}


def test_reading_comes_first(tmp_path, monkeypatch, memorised):
    from saeutils.lm import pretraining

    people = biographies.population(6, biographies.relations()[:2])
    asked, texts = biographies.questions(people), biographies.biographies(people, 1)
    tokenizer, streams = memorised[0].tokenizer, []
    monkeypatch.setattr(pretraining, "fit", lambda folder, model, tokenizer, batches, steps, *_, **__: streams.append(batches) or {steps[0]: {"name": ""}})
    biographies.memorise(tmp_path, torch.nn.Linear(2, 2), tokenizer, texts, asked, steps=20, read=7, batch=8, lr=1e-3)
    stream = [b for b, _ in zip(streams[0](0), range(20))]
    whole = [bool(wanted[:, 1:].any(dim=1).all() and wanted[:, 1].all()) for _, wanted in stream]  # biographies: all of it is predicted
    assert all(whole[:7]) and not all(whole[7:]) and {len(ids) for ids, _ in stream[:7]} == {2, 4}
    for at in (3, 7, 12):
        torch.testing.assert_close(next(streams[0](at))[0], stream[at][0])


def test_a_shipped_lm_is_found_by_texts_settings_and_first_weights(tmp_path, monkeypatch, memorised):
    from saeutils.kernels import traces
    from saeutils.lm import pretraining

    made, asked = [], biographies.questions(biographies.population(3))
    monkeypatch.setattr(pretraining, "fit", lambda folder, *_, **__: made.append(folder) or {5: {"name": "trained"}})
    monkeypatch.setattr(biographies.files, "data_dir", lambda: tmp_path)
    torch.manual_seed(0)
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    learn = partial(biographies.memorise, tmp_path, tokenizer=memorised[0].tokenizer, texts=["a b"], asked=asked, batch=8, lr=1e-3)
    assert learn(model=first, steps=5) == "trained"
    shipped = tmp_path / "biographies-lm" / made[0].name
    shipped.mkdir(parents=True)
    (shipped / "start.json").write_text(json.dumps(traces.of(first)))
    assert learn(model=first, steps=5) == str(shipped) and len(made) == 1
    assert learn(model=second, steps=5) == learn(model=first, steps=5, seed=1) == "trained" and made[1] == made[0] != made[2]


def test_bad_worlds_are_refused():
    with pytest.raises(ValueError, match=r"taught=\(0, 4\): templates of a question are 0 to 3"):
        biographies.questions(biographies.population(3), taught=(0, 4))
    with pytest.raises(ValueError, match=r"unknown relations .*shoe size"):
        biographies.population(5, ["shoe size"])
    with pytest.raises(ValueError, match="names for 1 to 1,010"):
        biographies.population(2000)
    with pytest.raises(ValueError, match="not a question: write"):
        biographies.require_prompts(["Q: When was Ann born?\nA:", "When was Ann born?"])
    with pytest.raises(ValueError, match="answers 25% of its training questions, 90% are needed"):
        biographies.require_recall(np.array([True, False, False, False]), 0.9)


@pytest.fixture(scope="module")
def memorised(tmp_path_factory):
    people = biographies.population(6, biographies.relations()[:2])
    asked, texts = biographies.questions(people), biographies.biographies(people, 1)
    tokenizer = biographies.train_tokenizer([*texts, *asked.prompt, *asked.answer], 600)
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(n_positions=128, **size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    folder = tmp_path_factory.mktemp("lm")
    train = asked[asked.split == "train"]
    where = biographies.memorise(folder, model, tokenizer, texts, train, steps=150, batch=8, lr=3e-3)
    return models.load_lm(where, dtype=torch.float32), train


def test_a_small_lm_memorises_and_answers(memorised):
    lm, train = memorised
    made = biographies.answers(lm, list(train.prompt))
    assert np.mean(np.array(made) == train.answer) > 0.9


def test_last_states_are_those_of_single_prompts_and_a_delta_is_added_there(memorised):
    lm, train = memorised
    prompts, hook = list(train.prompt[:7]), "blocks.0.hook_resid_post"
    states = biographies.last_states(lm, prompts, [hook], batch_size=3)[hook]
    for prompt, state in zip(prompts, states):
        _, cache = lm.run_with_cache(lm.to_tokens(prompt), names_filter=[hook])
        torch.testing.assert_close(state, cache[hook][0, -1], rtol=1e-4, atol=1e-4)
    # moving every state to another question's gives that question's answer where only this token matters
    same = biographies.answers(lm, prompts, hook, torch.zeros_like(states))
    assert same == biographies.answers(lm, prompts)
    last = f"blocks.{lm.cfg.n_layers - 1}.hook_resid_post"
    finals = biographies.last_states(lm, prompts, [last])[last]
    moved = biographies.answers(lm, prompts, last, finals.roll(1, 0) - finals, tokens=1)
    assert moved == [a for a in np.roll(biographies.answers(lm, prompts, tokens=1), 1)]


def test_padding_is_neither_predicted_nor_seen(tmp_path, monkeypatch):
    from saeutils.lm import pretraining

    people = biographies.population(6, biographies.relations()[:2])
    asked, texts = biographies.questions(people), biographies.biographies(people, 1)
    tokenizer = biographies.train_tokenizer([*texts, *asked.prompt, *asked.answer], 600)
    seen = {}

    def fit(folder, model, tokenizer, batches, steps, lr, **_):
        seen["batches"] = [b for b, _ in zip(batches(0), range(5))]
        seen["later"] = next(batches(3))
        return {steps[0]: {"name": ""}}

    monkeypatch.setattr(pretraining, "fit", fit)
    biographies.memorise(
        tmp_path, torch.nn.Linear(2, 2), tokenizer, texts, asked, steps=1, batch=8, lr=1e-3
    )
    for ids, wanted in seen["batches"]:
        for row, want in zip(ids, wanted):
            told, counted = tokenizer.decode(row[~want]), tokenizer.decode(row[want])
            assert counted.endswith(biographies.END) and counted.count(biographies.END) == 1
            answer = counted.removesuffix(biographies.END)
            assert answer in texts or (answer.strip() in set(asked.answer) and "A:" in told)
    torch.testing.assert_close(seen["later"][0], seen["batches"][3][0])
