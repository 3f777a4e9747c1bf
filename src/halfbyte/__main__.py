import importlib
import sys
from pathlib import Path

# `-m` puts the working directory first, where a user's json.py or random.py may lie
if sys.path and sys.path[0] in ("", str(Path.cwd())) and not sys.flags.safe_path:
    del sys.path[0]
importlib.import_module("halfbyte.cli").main()
