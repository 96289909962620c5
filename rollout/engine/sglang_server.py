"""SGLang's own OpenAI-compatible HTTP server, in this process, which it ends with. No bridge and no episodes."""

from __future__ import annotations

import os
from typing import Any


def serve(arguments: dict[str, Any]) -> int:
    """Serves with these of SGLang's ServerArgs until it is stopped; says where once it answers."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    url = f"http://{arguments['host']}:{arguments['port']}/v1"

    def ready() -> None:
        print(f"serving {arguments['served_model_name']} ({arguments['model_path']}) at {url}", flush=True)
        print(f'  python launch.py ask --server {url} --database FILE.sqlite "question"', flush=True)

    try:
        launch_server(ServerArgs(**arguments), launch_callback=ready)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
    return 0
