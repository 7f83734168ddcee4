"""The mixed critic: every context is an expert, and a small network weighs them by how well each is known.

    critic = MixedCritic(train_ids, vocab_size, context=6, strings=["\\n", " ", …])
    opinion = critic.opinion(tokens, positions)     # tokens (B, T), positions (B,): where each window starts

Interpolation (ngram.py, suffixes.py) lets the longest context speak first and passes on the rest. Here J contexts
speak at once, of the last 1, 2, … tokens and of words and lines (mixed_contexts.py), as a product of experts:

    log p(w) = b(w) + Σ_j weight_j · log p_j(w) + constant,     (weight_1 … weight_J) = network(log(1 + C), log(1 + U)),

    p_j(w) = (c_j(w) + λ U_j p_i(w)) / (C_j + λ U_j),

with c_j the counts after context j, C their sum, U how many are above 0, and i the shorter context that j falls back
on. Network and b learn from parts of the training text, each judged by its contexts in the others. That is new
text, as validation text will be: judged without their own occurrence alone, positions of a text are far easier than
new ones, for what is peculiar to their page still counts, and long contexts are believed too soon.

Source: log-linear interpolation (Klakow, 1998), gated as compressors mix contexts (Mahoney, 2005).
Shapes: B windows, T positions, N = B·T, V vocabulary, J kinds of context.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avatarl.critics import DenseOpinion
from avatarl.memory import memory_left
from avatarl.mixed_contexts import NOTHING, Contexts
from avatarl.mixed_counts import TOKEN_BITS, ContextCounts
from avatarl.ngram_counts import Stream, checked_stream
from avatarl.stored import read_stored, write_stored
from config import require

MAX_VOCABULARY = 2**TOKEN_BITS
LAYOUT = 3  # of a stored network; another number makes every stored one foreign
BACKOFF = 4.0  # λ
HIDDEN = 32
FIT_POSITIONS = 90_000
FIT_ENTRIES = 2**28  # log-probabilities, in float16, that the fit looks at: fewer positions of large vocabularies
FIT_PARTS = (3, 6)  # of the text, each judged by the others: at least and at most,
FIT_PART = 80_000  # tokens each where that may be: the rest is too much like what is held out of it in short parts
FIT_STEPS = 1200
FIT_BATCH = 1024
FIT_BATCH_ENTRIES = 2**21  # log-probabilities in a batch: fewer positions of large vocabularies
FIT_RATE = 5e-3
FIT_DECAY = 0.1
KEYS_AT_ONCE = 2**16  # of the corpus
CHUNK_ENTRIES = 2**23  # counts that are made at a time
MEMORY_BYTES = 2**29
BYTES_A_TOKEN = 600  # of the corpus while it is counted, about: an estimate, to refuse what is far too large
LARGE = 2**22  # tokens from which on it is asked whether there is room


def require_memory(tokens: int) -> None:
    """Raise ConfigError where counting so many tokens would take more memory than is left."""
    left, needed = memory_left() if tokens >= LARGE else None, BYTES_A_TOKEN * tokens
    require(
        left is None or needed <= left,
        "critic.kind",
        "mixed",
        f"counting {tokens:,} tokens takes about {needed / 1e9:,.0f} GB and {(left or 0) / 1e9:,.0f} GB are left; use "
        "--critic.kind suffix or ngram, or less of the text (--data.train-stop)",
    )


class Weigher(nn.Module):
    """The network: what each of J experts is worth, (N, 2 J) → (N, J); and the bias (V,)."""

    def __init__(self, experts: int, vocab_size: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(2 * experts))
        self.scale = nn.Buffer(torch.ones(2 * experts))
        self.inner = nn.Linear(2 * experts, HIDDEN)
        self.outer = nn.Linear(HIDDEN, experts)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def reset(self, known: Tensor, draw: torch.Generator) -> None:
        """Begin where all experts are worth the same, with inputs (n, 2 J) of mean 0 and variance 1."""
        self.mean.copy_(known.mean(0))
        self.scale.copy_(known.std(0, correction=0).clamp_min(0.1))
        bound = self.inner.in_features**-0.5
        with torch.no_grad():
            self.inner.weight.copy_(torch.rand(self.inner.weight.shape, generator=draw) * 2 * bound - bound)
            self.inner.bias.zero_()
            self.outer.weight.zero_()
            self.outer.bias.fill_(1 / self.outer.out_features)

    def forward(self, known: Tensor) -> Tensor:
        """What the experts are worth where this is known of them, (N, 2 J): (N, J)."""
        return self.outer(nn.functional.gelu(self.inner((known - self.mean) / self.scale)))

    def scores(self, log_p: Tensor, known: Tensor) -> Tensor:
        """Logits (N, V) of what the experts, log_p (J, N, V), think together.

        The sum has one order, whatever the rows beside a row, so that resumed and divided runs hear the same.
        """
        worth = self(known.to(self.bias.dtype)).to(log_p.dtype)  # (N, J)
        total = self.bias.to(log_p.dtype).repeat(len(known), 1)
        for j, of_expert in enumerate(log_p):
            total.addcmul_(worth[:, j, None], of_expert)
        return total


class MixedCritic:
    """Judges every token by all its contexts of up to `context` tokens, and by words and lines, together.

    corpus (L,): ids of the training stream, in [0, vocab_size); strings (V,): what each token stands for, if known.
    Contexts reach back beyond a window's first token where its place in the corpus is known. Building takes seconds
    for a million characters. Raises ConfigError for a corpus or a setting that gives no table.

    remember: what was once said of a position of the corpus is kept (in float16, 2 · L · V bytes, if that is at most
    MEMORY_BYTES) and not thought out again. For training on the corpus's own tokens alone. folder: where the fitted
    network is kept for the next critic of the same text, so that a run that is resumed meets its judge at once.
    """

    def __init__(
        self,
        corpus: Stream,
        vocab_size: int,
        *,
        context: int = 6,
        strings: Sequence[str] = (),
        leave_one_out: bool = True,
        remember: bool = False,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        require(context >= 1, "critic.mixed-context", context, "use 1 or more tokens")
        require(
            vocab_size <= MAX_VOCABULARY,
            "critic.kind",
            "mixed",
            f"it scores the whole vocabulary of {vocab_size:,} tokens at every position, and stops at "
            f"{MAX_VOCABULARY:,}; use --critic.kind suffix",
        )
        require_memory(len(corpus))
        ids = checked_stream(corpus, vocab_size, 0.5, least=context + 2)
        self.vocab_size, self.leave_one_out = vocab_size, leave_one_out
        self.contexts = Contexts(vocab_size, context, strings)
        self.corpus = torch.from_numpy(ids)  # (L,) int64
        keys = self._keys_of_corpus()
        self.counts, entry_of = ContextCounts.build(keys, self.corpus[1:])
        shares = np.bincount(ids, minlength=vocab_size) + 1.0
        self.unigram = torch.from_numpy(shares / shares.sum()).float()  # where no context was seen
        self.weigher = Weigher(len(self.contexts.names), vocab_size)
        self._fit(keys, entry_of, folder)
        self.corpus, self.unigram = self.corpus.to(device), self.unigram.to(device)
        self.contexts = self.contexts.to(device)
        self.counts = self.counts.to(device)
        self.weigher = self.weigher.requires_grad_(False).to(device, torch.float64)  # or it would depend on the batch
        self._memory: Tensor | None = None
        self._known = torch.zeros(0, dtype=torch.bool)
        if remember and leave_one_out and 2 * len(ids) * vocab_size <= MEMORY_BYTES:
            self._memory = torch.empty(len(ids), vocab_size, dtype=torch.float16, device=device)
            self._known = torch.zeros(len(ids), dtype=torch.bool, device=device)
            if self._memory.is_cuda:  # there a step must not wait to hear what is known; a CPU learns on the way
                for here in _chunks(len(ids), 2**14):
                    self._learn(self.corpus[None, here], torch.tensor([here.start], device=device))

    def opinion(self, tokens: Tensor, positions: Tensor | None = None) -> DenseOpinion:
        """What follows each of tokens (B, T), N = B·T in row-major order.

        positions (B,) is the offset of tokens[:, 0] in the corpus: what stands before it there belongs to the
        contexts, and the occurrence of gold at (b, t), corpus[positions[b] + t + 1], is left out of the counts.
        None: contexts stay inside the window and nothing is left out.
        """
        if positions is not None and self._memory is not None:
            places = (positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)).flatten()
            if not places.is_cuda and not self._known[places].all():
                self._learn(tokens, positions)
            return DenseOpinion(self._memory.index_select(0, places).float())
        return DenseOpinion(self._judge(*self._asked(tokens, positions)))

    @property
    def reach(self) -> int:
        """The longest context that is used, in tokens."""
        return self.contexts.reach

    def after(self, context: Tensor) -> DenseOpinion:
        """What follows each of contexts (N, C), nothing left out."""
        return DenseOpinion(self._judge(self.contexts.keys(context, last=1)[:, 0]))

    def _fit(self, keys: Tensor, entry_of: Tensor, folder: Path | None) -> None:
        """Fit the network, or take over what was fitted to the same text in the same way."""
        if folder is None:
            return fit(self, keys, entry_of)
        sample = (FIT_POSITIONS, FIT_ENTRIES, FIT_PARTS, FIT_PART)
        fitting = (BACKOFF, HIDDEN, FIT_STEPS, FIT_BATCH, FIT_BATCH_ENTRIES, FIT_RATE, FIT_DECAY)
        told = repr((LAYOUT, self.contexts.settings, sample, fitting)).encode()
        digest = hashlib.sha256(told + self.corpus.numpy().tobytes()).hexdigest()
        path = folder / f"mixed-{digest[:16]}.safetensors"
        stored = read_stored(path, digest)
        if stored is not None and stored.keys() == self.weigher.state_dict().keys():
            self.weigher.load_state_dict(stored)
            return None
        fit(self, keys, entry_of)
        return write_stored(path, digest, self.weigher.state_dict())

    def _keys_of_corpus(self) -> Tensor:
        """Keys of what stands before every token but the first: (L − 1, J) int64."""
        text, back = self.corpus[None, :-1], self.reach
        parts = []
        for here in _chunks(text.shape[1], KEYS_AT_ONCE):
            begin = max(0, here.start - back)
            parts.append(self.contexts.keys(text[:, begin : here.stop])[0, here.start - begin :])
        return torch.cat(parts)

    def _learn(self, tokens: Tensor, positions: Tensor) -> None:
        """Judge those of the corpus's tokens (B, T), which begin at `positions` (B,), that are new, and remember it."""
        assert self._memory is not None
        places = (positions[:, None] + torch.arange(tokens.shape[1], device=tokens.device)).flatten()
        new = ~self._known[places]
        keys, gold, own = self._asked(tokens, positions)
        assert gold is not None and own is not None  # who remembers leaves out
        self._memory[places[new]] = self._judge(keys[new], gold[new], own[new]).half()
        self._known[places] = True

    def _asked(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of tokens (B, T): keys (N, J); where something is left out, gold (N,) and from which contexts (N, J)."""
        if positions is None:
            return self.contexts.keys(tokens).flatten(0, 1), None, None
        last, back = len(self.corpus) - 1, self.reach
        place = positions[:, None] + torch.arange(-back, tokens.shape[1], device=tokens.device)
        begun = (-place[:, 0]).clamp_min(0)  # how many places lie before the corpus
        there = self.corpus[place.clamp(0, last)]
        stream = torch.cat((there[:, :back], tokens), 1)
        keys = self.contexts.keys(stream, begun, tokens.shape[1]).flatten(0, 1)
        if not self.leave_one_out:
            return keys, None, None
        theirs = keys
        if tokens.is_cuda or not torch.equal(tokens, there[:, back:]):  # a GPU is not asked: that would wait for it
            theirs = self.contexts.keys(there, begun, tokens.shape[1]).flatten(0, 1)
        inside = (place[:, back:] < last).reshape(-1, 1)  # past its end there is no gold
        gold = self.corpus[(place[:, back:] + 1).clamp_max(last)].flatten()
        return keys, gold, (keys == theirs) & (keys != NOTHING) & inside

    def _judge(self, keys: Tensor, gold: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """Log-probabilities (N, V) after contexts (N, J), without the occurrence of gold (N,) in their `own` (N, J)."""
        made = []
        for part in _chunks(len(keys), CHUNK_ENTRIES // (keys.shape[1] * self.vocab_size)):
            counts, total, kinds = self.counts.seen(keys[part], self.vocab_size)
            if gold is not None and own is not None:
                left_out, place = own[part].T.float(), gold[part, None].expand(len(total), -1, 1)
                kinds = kinds - left_out * (counts.gather(2, place)[..., 0] == 1)
                total = total - left_out
                counts.scatter_add_(2, place, -left_out[..., None])
            made.append(self.weigher.scores(*self.experts(counts, total, kinds)).log_softmax(-1))
        return torch.cat(made)

    def experts(self, counts: Tensor, total: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        """What each context thinks, and how well it is known: log p_j (J, N, V), in place of counts, and (N, 2 J).

        counts (J, N, V); total and kinds (J, N): their sum, and how many are above 0.
        """
        spread, p = BACKOFF * kinds, counts
        own = 1 / (total + spread).clamp_min(1)
        passed_on = torch.where(total > 0, spread * own, 1.0)  # to the context that this one falls back on
        least = torch.finfo(p.dtype).tiny  # after long runs of one token the others' p is not far from 0
        for j, shorter in enumerate(self.contexts.fallbacks):
            base = p[shorter] if shorter >= 0 else self.unigram
            p[j].mul_(own[j, :, None]).addcmul_(passed_on[j, :, None], base)
        return p.clamp_min_(least).log_(), torch.cat((total, kinds)).T.log1p()


def _chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that make up range(count)."""
    return (slice(i, i + max(1, size)) for i in range(0, count, max(1, size)))


def parts_of(length: int) -> int:
    """Into how many parts a text of `length` tokens is cut for the fit."""
    least, most = FIT_PARTS
    return min(most, max(least, length // FIT_PART))


@torch.no_grad()
def held_out(critic: MixedCritic, keys: Tensor, entry_of: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of every part of the corpus, judged by the counts of the others.

    keys and entry_of (L − 1, J) are of all positions. Returns log p_j (n, J, V) in float16, what is known of the
    contexts (n, 2 J), and gold (n,). The unigram, which speaks where no context was seen, is that of the whole text.
    """
    length, (experts, vocab_size) = len(keys), (keys.shape[1], critic.vocab_size)
    parts = parts_of(length)
    each = max(1, min(FIT_POSITIONS, FIT_ENTRIES // (experts * vocab_size)) // parts)
    draw, found = torch.Generator().manual_seed(0), []
    for part in range(parts):
        start, stop = part * length // parts, (part + 1) * length // parts
        taken = entry_of[start:stop]
        gone = torch.bincount(taken[taken >= 0], minlength=len(critic.counts.counts))
        rest = critic.counts.without(gone)
        places = start + torch.randperm(stop - start, generator=draw)[:each]
        for some in _chunks(len(places), CHUNK_ENTRIES // (experts * vocab_size)):
            here = places[some]
            log_p, known = critic.experts(*rest.seen(keys[here], vocab_size))
            found.append((log_p.transpose(0, 1).half(), known, critic.corpus[here + 1]))
    log_p, known, gold = map(torch.cat, zip(*found, strict=True))
    return log_p, known, gold


def fit(critic: MixedCritic, keys: Tensor, entry_of: Tensor) -> None:
    """Teach the critic's weigher what its experts are worth on text that their counts lack, from a fixed seed."""
    log_p, known, gold = held_out(critic, keys, entry_of)
    draw, weigher = torch.Generator().manual_seed(1), critic.weigher
    weigher.reset(known, draw)
    batch = max(1, min(FIT_BATCH, FIT_BATCH_ENTRIES // log_p[0].numel()))
    optimizer = torch.optim.AdamW(weigher.parameters(), lr=FIT_RATE, weight_decay=FIT_DECAY)
    with torch.enable_grad():
        for step in range(FIT_STEPS):
            optimizer.param_groups[0]["lr"] = FIT_RATE * (1 - step / FIT_STEPS)
            pick = torch.randint(len(gold), (batch,), generator=draw)
            worth = weigher(known[pick])[:, None]  # (n, 1, J)
            scores = torch.bmm(worth, log_p.index_select(0, pick).float())[:, 0] + weigher.bias
            loss = nn.functional.cross_entropy(scores, gold[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
