"""A world of invented people: biographies to memorise, questions about them, and a language model that has learned both.

After the world of AlignSAE (arXiv:2512.02004) and of "Physics of language models" (arXiv:2309.14316); names, values and
sentences are our own, in ``data/biographies.json``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from saeutils.kernels import files, traces
from saeutils.kernels.door import door, optionally
from saeutils.lm import pretraining
from saeutils.lm.tokens import encode, ends, until_end
from saeutils.steering import edits, generation

if TYPE_CHECKING:  # late: together they take seconds to import
    from transformer_lens.model_bridge import TransformerBridge

PROMPT = "Q: {}\nA:"
SHAPE = re.compile(r"Q: .+\nA:")
END = "<|endoftext|>"
TEMPLATES = range(4)  # of a question, to be taught or held out; a fifth is never taught
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


@functools.cache
def lists() -> dict:
    """Names; and for every relation its values (dates are made), fifty statements and five questions."""
    return json.loads((files.data_dir() / "biographies.json").read_text())


def relations() -> list[str]:
    """The six relations of the paper, then six more of ours."""
    return list(lists()["relations"])


def population(n: int, relations_: Sequence[str] | None = None, seed: int = 0) -> pd.DataFrame:
    """``n`` people: columns name, pronoun, and one for each relation. The employer fixes the work city.

    Raises:
        ValueError: an unknown relation, more people than last names.
    """
    door(n=n, seed=seed)
    wanted = list(relations_ or relations()[:6])
    if unknown := sorted(set(wanted) - set(relations())):
        raise ValueError(f"unknown relations {unknown}: one of {relations()}")
    if not 0 < n <= len(lists()["last"]):
        raise ValueError(f"{n} people: there are names for 1 to {len(lists()['last']):,}")
    rng, given = np.random.default_rng(seed), lists()
    parts = rng.choice(given["first"], n), rng.choice(given["middle"], n), rng.permutation(given["last"])[:n]
    people = pd.DataFrame({"name": [" ".join(p) for p in zip(*parts)], "pronoun": rng.choice(["he", "she"], n)})
    for relation in relations():  # all, so that a person stays the same whichever are wanted
        values = given["relations"][relation].get("values")
        people[relation] = rng.choice(values, n) if values else _dates(n, rng) if relation == "birth date" else ""
    offices = dict(
        zip(given["relations"]["employer"]["values"], rng.choice(given["relations"]["birth city"]["values"], 1000))
    )
    people["work city"] = people["employer"].map(offices)
    return people[["name", "pronoun", *wanted]]


def _dates(n: int, rng: np.random.Generator) -> list[str]:
    drawn = zip(rng.integers(1, 29, n), rng.integers(0, 12, n), rng.integers(1940, 2000, n))
    return [f"{day} {MONTHS[month]} {year}" for day, month, year in drawn]


def biographies(people: pd.DataFrame, variants: int = 5, seed: int = 0) -> list[str]:
    """``variants`` texts a person: one statement for each relation, in random order, each with the name.

    With a pronoun behind the first sentence a small LM learns the facts and cannot be asked for them ("Physics of language
    models", part 3.1, arXiv:2309.14316).
    """
    rng, texts = np.random.default_rng(seed), []
    for person in people.to_dict("records"):
        for _ in range(variants):
            said = rng.permutation(list(person)[2:])
            drawn = [rng.choice(lists()["relations"][r]["statements"]) for r in said]
            told = [t.format(s=person["name"], v=person[r]) for t, r in zip(drawn, said)]
            texts.append(" ".join(t[0].upper() + t[1:] for t in told))
    return texts


def questions(people: pd.DataFrame, unseen: float = 0.1, seed: int = 0, taught: Sequence[int] = (0, 1)) -> pd.DataFrame:
    """Every question about every person: columns person (row of ``people``), relation, template, split, prompt, answer.

    split: ``train`` (the ``taught`` ones of templates 0 to 3, of most people), ``unseen template`` (the others of them, of
    the same people), ``unseen person`` (taught ones, of a share ``unseen`` of the people), ``unseen both``, and ``untaught
    template`` (template 4, in words that nothing else here holds). Nothing but ``train`` is meant to be trained on; the
    biographies of unseen people are.

    Raises:
        ValueError: templates that are not some of 0 to 3.
    """
    door(unseen=unseen, seed=seed)
    if not taught or not set(taught) <= set(TEMPLATES):
        raise ValueError(f"taught={taught!r}: templates of a question are 0 to 3, teach at least one")
    rng = np.random.default_rng(seed)
    strangers = set(rng.permutation(len(people))[: round(unseen * len(people))].tolist())
    names = {(False, True): "train", (False, False): "unseen template", (True, True): "unseen person"}
    rows = [
        (i, relation, n, names.get((i in strangers, n in taught), "unseen both") if n in TEMPLATES else "untaught template",
         PROMPT.format(q.format(s=person["name"], p=person["pronoun"])), person[relation])
        for i, person in enumerate(people.to_dict("records"))
        for relation in people.columns[2:]
        for n, q in enumerate(lists()["relations"][relation]["questions"])
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["person", "relation", "template", "split", "prompt", "answer"])


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's: a blank belongs to the word after it; one special token, which begins and ends."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def memorise(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] | None, asked: pd.DataFrame,
    *, steps: int, batch: int, lr: float, read: int = 0, seed: int = 0,
) -> str:  # fmt: skip
    """Train an LM on biographies (every token counts; None: no texts) and questions (the answer's tokens count), end token included.

    The first ``read`` of the ``steps`` see biographies alone, half a batch of them at a time: an LM that gets both from the
    start may learn each question by heart. Rows of like length share a batch, and padding is neither predicted nor seen. A
    killed run goes on where it stopped; a finished one with the same texts, first weights and settings is found in
    ``folder``, or among those shipped in ``data/biographies-lm`` (the kept folder, and ``start.json``: traces of the first weights).

    Returns:
        the folder of the trained model, as :func:`saeutils.lm.models.load_lm` takes it.
    """
    door(steps=steps, batch=batch, lr=lr, seed=seed)
    optionally(texts=texts)
    told = [] if texts is None else [("", text) for text in texts]
    pairs = told + list(zip(asked["prompt"], " " + asked["answer"]))
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    settings = json.dumps([pairs, steps, read, batch, lr, seed, shapes])
    key = hashlib.sha256(settings.encode()).hexdigest()[:12]
    shipped = files.data_dir() / "biographies-lm" / key
    if shipped.exists() and traces.all_alike(json.loads((shipped / "start.json").read_text()), traces.of(model)):
        return str(shipped)

    def batches(at: int) -> Iterator[tuple[Tensor, Tensor]]:
        if at < read:
            yield from islice(_rows(told, tokenizer, -(-batch // 2), seed, at), read - at)
        yield from _rows(pairs, tokenizer, batch, seed, max(0, at - read))

    folder = folder / key
    found = pretraining.fit(
        folder, model, tokenizer, batches, [steps], lr, of={"settings": key}, betas=(0.9, 0.999), every=-(-steps // 10)
    )
    return found[steps]["name"]


def _rows(
    pairs: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, batch: int, seed: int, at: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches from step ``at`` of (ids [batch, position], which of them are to be predicted), rows of like length together."""
    heads, tails = (tokenizer([p[i] for p in pairs], add_special_tokens=False)["input_ids"] for i in (0, 1))
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [torch.tensor([start, *head, *tail, end]) for head, tail in zip(heads, tails)]
    told, length = (torch.tensor([len(r) + extra for r in ids]) for ids, extra in ((heads, 1), (rows, 0)))
    per_epoch = -(-len(rows) // batch)
    for epoch in count(at // per_epoch):
        rng = np.random.default_rng([seed, epoch])
        order = sorted(rng.permutation(len(rows)), key=lambda i: int(length[i]) // 8)  # stable: random within a length
        for n in rng.permutation(per_epoch)[at % per_epoch :]:
            part = order[n * batch : (n + 1) * batch]
            ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in part], batch_first=True)  # [batch, position]
            place = torch.arange(ids.shape[1])
            yield ids, (place >= told[part][:, None]) & (place < length[part][:, None])
        at = 0  # only the first epoch begins in its middle


def require_prompts(prompts: Sequence[str], **given: object) -> None:
    """Questions must be ``Q: …\\nA:``, the shape that the LM was trained on; ``given``: what else the door looks at.

    Raises:
        ValueError: one is not, it is shown.
    """
    door(prompts=prompts, **given)
    if bad := [p for p in prompts if not SHAPE.fullmatch(p)]:
        raise ValueError(f"{bad[0]!r} is not a question: write {PROMPT.format('…')!r}, nothing after it")


@torch.no_grad()
def answers(
    lm: TransformerBridge, prompts: Sequence[str], hook: str = "", delta: Tensor | None = None, *, tokens: int = 12,
    batch_size: int = 256,
) -> list[str]:  # fmt: skip
    """Greedy answers, up to the end token; row i of ``delta`` [n, d] is added at ``hook`` on prompt i's last token."""
    require_prompts(prompts, lm=lm, tokens=tokens, batch_size=batch_size)
    ids = [encode(lm, p)[0] for p in prompts]
    out, last = [""] * len(ids), ends(lm)
    for part in generation.same_length(ids, batch_size):
        added = [] if delta is None else [edits.add(hook, delta[part], positions=[-1])]
        with edits.edited(lm, added):
            made = generation.continued(lm, torch.stack([ids[i] for i in part]), tokens)
        for i, row in zip(part, made.tolist()):
            out[i] = lm.tokenizer.decode(until_end(row, last)).strip()
    return out


@torch.no_grad()
def last_states(
    lm: TransformerBridge, prompts: Sequence[str], hooks: Sequence[str], batch_size: int = 256
) -> dict[str, Tensor]:
    """Activations on the last token of each prompt, at several hook points in one pass (logits of one position): {hook: [n, d]}."""
    require_prompts(prompts, lm=lm, batch_size=batch_size)
    ids = [encode(lm, p)[0] for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    kept: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for at in range(0, len(order), batch_size):
        part = [ids[i] for i in order[at : at + batch_size]]
        end = torch.tensor([len(p) - 1 for p in part], device=part[0].device)

        def look(x: Tensor, hook, to: list[Tensor], end: Tensor = end) -> None:
            to.append(x[torch.arange(len(x)), end].float().cpu())

        with edits.edited(lm, [(hook, functools.partial(look, to=to)) for hook, to in kept.items()]):
            lm.original_model(torch.nn.utils.rnn.pad_sequence(part, batch_first=True), use_cache=False, logits_to_keep=1)
    back = torch.tensor(order).argsort()
    return {hook: torch.cat(parts)[back] for hook, parts in kept.items()}


def require_recall(right: pd.Series | np.ndarray, least: float) -> None:
    """An LM that has not memorised its world has nothing for an SAE to bind.

    Raises:
        ValueError: fewer than the share ``least`` of training questions are answered right.
    """
    if (share := float(np.mean(right))) < least:
        raise ValueError(
            f"the LM answers {share:.0%} of its training questions, {least:.0%} are needed: train it for more steps"
        )
