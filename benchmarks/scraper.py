"""A scraper in a process of its own: ``python scraper.py URL``, then told on standard input what to do.

``start SECONDS`` scrapes at once, and then every so many seconds; ``stop`` ends that and answers with a line of JSON:
how long each scrape took, in seconds, and the last page.
"""

import json
import sys
import time
import urllib.request
from queue import Empty, Queue
from threading import Thread


def listen(commands: Queue) -> None:
    for line in sys.stdin:
        commands.put(line)
    commands.put("end")


def main() -> None:
    url, interval, due, taken, page = sys.argv[1], 0.0, 0.0, [], ""
    commands: Queue = Queue()
    Thread(target=listen, args=[commands], daemon=True).start()
    while True:
        try:
            wait = max(due - time.monotonic(), 0.0) if interval else None
            command, *rest = commands.get(timeout=wait).split()
        except Empty:
            due += interval
            started = time.perf_counter()
            with urllib.request.urlopen(url) as answer:
                page = answer.read().decode()
            taken.append(time.perf_counter() - started)
            continue
        if command == "start":
            interval, due, taken = float(rest[0]), time.monotonic(), []
        elif command == "stop":
            interval = 0.0
            print(json.dumps({"seconds": taken, "page": page}), flush=True)
        else:
            return


if __name__ == "__main__":
    main()
