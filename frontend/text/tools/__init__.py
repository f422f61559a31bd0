"""Parsers of tool calls, by name. The names are those that users of other servers know."""

from __future__ import annotations

from penstock.frontend.text.tools.base import ToolParser
from penstock.frontend.text.tools.deepseek import DeepSeek, DeepSeekV31
from penstock.frontend.text.tools.glm import Glm
from penstock.frontend.text.tools.granite import Granite
from penstock.frontend.text.tools.harmony import Harmony
from penstock.frontend.text.tools.hermes import Hermes
from penstock.frontend.text.tools.json_list import JsonList
from penstock.frontend.text.tools.kimi_k2 import KimiK2
from penstock.frontend.text.tools.llama3_json import Llama3Json
from penstock.frontend.text.tools.marked_json import InternLM, Jamba, Phi4Mini
from penstock.frontend.text.tools.minimax import MiniMax
from penstock.frontend.text.tools.mistral import Mistral
from penstock.frontend.text.tools.pythonic import Pythonic
from penstock.frontend.text.tools.qwen3_xml import Qwen3Xml

__all__ = ["FALLBACK", "TOOL_PARSERS", "ToolParser"]

FALLBACK = "json"
TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "llama4_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
    "llama4_pythonic": Pythonic,
    "qwen3_xml": Qwen3Xml,
    "qwen3_coder": Qwen3Xml,
    "deepseek_v3": DeepSeek,
    "deepseek_v31": DeepSeekV31,
    "granite": Granite,
    "granite4": Hermes,
    "glm": Glm,
    "glm45": Glm,
    "kimi_k2": KimiK2,
    "minimax_m2": MiniMax,
    "openai": Harmony,
    "harmony": Harmony,
    "internlm": InternLM,
    "jamba": Jamba,
    "phi4_mini_json": Phi4Mini,
    FALLBACK: JsonList,
}
