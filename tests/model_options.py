"""Models of every kind: plain GPT-2, each option alone, and all of them together."""

OPTIONS: list[dict] = [
    {},
    {"bias": False},
    {"position": "rope"},
    {"norm": "rmsnorm"},
    {"activation": "relu2"},
    {"activation": "gelu-erf"},
    {"qk_norm": True},
    {"short_conv": 3},
    {"ngram_embed": 4, "ngram_rows": 64},
    {
        "bias": False,
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "relu2",
        "qk_norm": True,
        "short_conv": 2,
        "ngram_embed": 3,
        "ngram_rows": 16,
    },
]
