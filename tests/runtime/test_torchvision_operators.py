from __future__ import annotations

import subprocess
import sys


def test_torchvision_can_be_imported() -> None:
    """Whatever its operators are built for; with ones that can't be loaded, as torchvision's own import refuses."""
    lines = (
        "from distaccum.runtime.torchvision_operators import tolerate_missing_operators as tolerate",
        "tolerate()",
        "tolerate()",
        "import torch, torchvision.transforms.v2 as v2",
        "print(v2.CenterCrop(2)(torch.zeros(3, 4, 4)).shape)",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([3, 2, 2])", done.stderr
