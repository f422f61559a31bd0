"""Names of architectures that do not generate, and what of them is the family's. Names only."""

from __future__ import annotations

CLASSIFIER = "ForSequenceClassification"
# Name before what follows "Model" or "For" -> family.
ENCODERS = {
    "Bert": "bert",
    "Roberta": "roberta",
    "XLMRoberta": "xlm-roberta",
    "Camembert": "roberta",
    "DistilBert": "distilbert",
    "MPNet": "mpnet",
    "ModernBert": "modernbert",
    "NomicBert": "nomic_bert",
}
DECODERS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_ENCODER_ENDS = ("Model", "ForMaskedLM", "ForPreTraining", CLASSIFIER)
_DECODER_ENDS = ("Model", CLASSIFIER, "ForCausalLM")


def divide(name: str) -> tuple[str, str]:
    """BertForMaskedLM -> Bert, ForMaskedLM; two empty strings for what is no pooled model."""
    for bases, ends in ((ENCODERS, _ENCODER_ENDS), (DECODERS, _DECODER_ENDS)):
        for base in bases:
            end = name.removeprefix(base)
            if name.startswith(base) and end in ends:
                return base, end
    return "", ""


def described() -> str:
    """The pooled models in words, for a refusal."""
    return f"to embed or classify {', '.join([*ENCODERS, *DECODERS])} with Model or {CLASSIFIER}"
