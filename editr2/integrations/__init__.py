"""The operators inside other people's code: `patch` for trainers, `editr2.integrations.diffusers`
for pipelines.

import editr2.integrations as e

e.patch("flow_grpo")
"""

from editr2.integrations.patching import Patched, original, patch, unpatch

__all__ = ["Patched", "original", "patch", "unpatch"]
