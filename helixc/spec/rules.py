"""The rules (codes and explanations) of findings made while a file is read and typed: HX0xx syntax, HX1xx schema."""

from __future__ import annotations

from inspect import cleandoc

from helixc.diagnostics import Rule, Severity


def _error(code: str, title: str, explanation: str) -> Rule:
    return Rule(code, Severity.ERROR, title, cleandoc(explanation))


def _note(code: str, title: str, explanation: str) -> Rule:
    return Rule(code, Severity.NOTE, title, cleandoc(explanation))


UNREADABLE = _error(
    "HX001",
    "The file cannot be read",
    """The path does not exist, is a folder, may not be read, or holds more than a deployment file plausibly does; or a
    pattern such as `configs/*.yaml` matches no file. Give the paths of YAML files, or `-` for the standard input.""",
)
NOT_TEXT = _error(
    "HX002",
    "The file is not UTF-8 text",
    """A deployment file is UTF-8 (a byte order mark is allowed) without control characters. Save it as UTF-8.""",
)
YAML_SYNTAX = _error(
    "HX003",
    "The file is not valid YAML",
    """The YAML parser stopped here, so nothing after this place was checked. Frequent causes: a tab used to indent, a
    missing space after a colon, lines of one mapping indented differently, a quote that is never closed.""",
)
DUPLICATE_KEY = _error(
    "HX004",
    "A key stands twice in one mapping",
    """YAML readers silently keep one of the two values, usually the last. Remove one of them.""",
)
KEY_NOT_TEXT = _error(
    "HX005",
    "A key is not text",
    """Every key of a deployment file is a word. Here the key is a number, a truth value, null, a list or a mapping.""",
)
NOT_A_MAPPING = _error(
    "HX006",
    "The file is not a mapping of keys to values",
    """The smallest deployment file is

        model: llama-3.1-8b
        load_format: dummy
        parallelism: ctx tp1 / gen tp1 cp2""",
)
SEVERAL_DOCUMENTS = _error(
    "HX007",
    "The file holds several YAML documents",
    """One file describes one deployment. Remove the line `---` that starts a second document, or split the file.""",
)
BAD_TAG = _error(
    "HX008",
    "A YAML tag cannot be applied",
    """Only the tags of YAML's core schema are known (!!str, !!int, !!float, !!bool, !!null, !!seq, !!map), and the
    value must fit its tag. Nothing in a deployment file needs one.""",
)
BAD_ALIAS = _error(
    "HX009",
    "An alias cannot be expanded",
    """An alias that contains itself, aliases that expand to a huge document, or a merge key `<<` whose value is no
    mapping. Write the values out.""",
)

UNKNOWN_KEY = _error(
    "HX101",
    "A key is not known here",
    """Nothing is ignored silently: a misspelt key would leave its default in place. Correct the spelling, move the key
    to the section it belongs to, or remove it.""",
)
WRONG_TYPE = _error(
    "HX102",
    "A value has the wrong type",
    """Values are not converted: "2" (text), 2.0 (a decimal) and true are not the integer 2. YAML 1.2 applies, so yes,
    no, on and off are text and only true and false are truth values.""",
)
MISSING_KEY = _error(
    "HX103",
    "A required key is missing",
    """`model` is always needed, and the generation instances must be described: by `generation_servers` or by the `gen`
    part of `parallelism`.""",
)
OUT_OF_RANGE = _error(
    "HX104",
    "A value is out of range",
    """Sizes and counts are at least 1, and free_gpu_memory_fraction is above 0 and at most 1.""",
)
BAD_CHOICE = _error(
    "HX105",
    "A value is not one of the choices",
    """The key takes one of a few words. Spelling and case matter.""",
)
BAD_PARALLELISM = _error(
    "HX110",
    "The short form cannot be read",
    """`parallelism` describes one or both roles, separated by a slash:

        parallelism: ctx tp2 / gen tp1 cp2
        parallelism: ctx 2x tp2 pp2 / gen tp2 cp4 ep8

    A role is `ctx` or `gen`, then optionally the number of instances (`2x`), then sizes in any order, separated by
    spaces: tp, pp and cp, for mixture-of-experts layers ep and moe_tp, and the word dp for attention data parallelism
    over the tp ranks. A size that is left out keeps the value of the long form, or 1.""",
)
CONTRADICTION = _error(
    "HX111",
    "The short form and the long form disagree",
    """`parallelism` and the keys it stands for may both be given, but then they must be equal: neither wins. Remove one
    of the two, or make them equal.""",
)
BLOCK_SIZES_DIFFER = _error(
    "HX112",
    "Two values of tokens_per_block disagree",
    """A block is both the KV cache's page and the unit in which Helix deals tokens out to its cp ranks, and the context
    instances hand whole blocks to the generation instances. So cp_config and kv_cache_config, context_servers and
    generation_servers all use one size. It is enough to give it once.""",
)
SHARING_DIFFERS = _error(
    "HX113",
    "Two values of share_gpus disagree",
    """share_gpus may stand at the top level or under hardware. Give it once.""",
)
BAD_IGNORE = _error(
    "HX120",
    "A comment that should ignore a finding is not understood",
    """A comment at the end of a line, or alone in the line before, ignores a warning of that line:

        tensor_parallel_size: 16 # helixc: ignore[HX305] until the cp ranks are installed

    Several codes are separated by commas. A reason is needed: whoever reads the file next has to know whether it still
    holds. Errors cannot be ignored.""",
)
UNUSED_IGNORE = _note(
    "HX121",
    "A comment ignores a finding that is not there",
    """The line does not have the finding, or no longer. A comment that stays behind would hide the next one of its
    kind.""",
)

RULES = (
    UNREADABLE,
    NOT_TEXT,
    YAML_SYNTAX,
    DUPLICATE_KEY,
    KEY_NOT_TEXT,
    NOT_A_MAPPING,
    SEVERAL_DOCUMENTS,
    BAD_TAG,
    BAD_ALIAS,
    UNKNOWN_KEY,
    WRONG_TYPE,
    MISSING_KEY,
    OUT_OF_RANGE,
    BAD_CHOICE,
    BAD_PARALLELISM,
    CONTRADICTION,
    BLOCK_SIZES_DIFFER,
    SHARING_DIFFERS,
    BAD_IGNORE,
    UNUSED_IGNORE,
)
