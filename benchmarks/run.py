"""Every benchmark, one after the other.

python benchmarks/run.py --write          # all, at full length
python benchmarks/run.py --quick          # all, a look at each
python benchmarks/run.py --only spectra   # one of them; its own file has more options
"""

import argparse

import exact_radius
import exporter
import growth
import overhead
import peers
import spectra
from frame import common_options

import controllers

BENCHMARKS = {
    one.benchmark.name: one.benchmark for one in (spectra, overhead, growth, controllers, exact_radius, exporter, peers)
}


def main() -> None:
    listed = "\n".join(f"  {name}: {one.title}; {one.duration}" for name, one in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nAt full length on two CPU cores:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[*BENCHMARKS], metavar="NAME")
    common_options(parser)
    options = parser.parse_args()
    for index, name in enumerate(options.only, 1):
        print(f"[{index}/{len(options.only)}] {name}\n", flush=True)
        BENCHMARKS[name].run(options.device, quick=options.quick, write=options.write)


if __name__ == "__main__":
    main()
