"""The editors that `policy.model` names: a name, and the class behind it.

Data alone, so that settings can be checked against it without importing an editor. An entry is all
that the rest of the program knows of a model; what is true of it stands in its class
(`editr2.policies.configured`).
"""

DEFAULT = "unified"

MODELS: dict[str, str] = {
    "unified": "editr2.policies.unified.policy:UnifiedPolicy",
    "bagel": "editr2.policies.unified.bagel:BagelPolicy",
    "kontext": "editr2.policies.kontext:KontextPolicy",
    "klein": "editr2.policies.klein:KleinPolicy",
    "klein-kv": "editr2.policies.klein:KleinKVPolicy",
    "qwen-edit": "editr2.policies.qwen_edit:QwenEditPolicy",
    "qwen-edit-plus": "editr2.policies.qwen_edit:QwenEditPlusPolicy",
    "flux2": "editr2.policies.flux2:Flux2Policy",
    "longcat-edit": "editr2.policies.longcat:LongCatEditPolicy",
    "qwen-image-2.1": "editr2.policies.qwen_image:QwenImagePolicy",
}
