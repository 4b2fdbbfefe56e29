"""A cache on disk for engines whose answers cost money or time."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any


class DiskCache:
    """JSON values by key, in one SQLite file that several processes may use."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        with closing(self._open()) as db, db:
            db.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value TEXT)")

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30)

    def get(self, key: str) -> Any:
        """The value of a key, None without one."""
        with closing(self._open()) as db:
            row = db.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def put(self, key: str, value: object) -> None:
        """Keeps a value, in the place of an earlier one of the same key."""
        with closing(self._open()) as db, db:
            db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, json.dumps(value)))
