#!/bin/sh
# Hardware counters of one launch of each important kernel, and the kernels of a decode step with the gaps between.
#
#   benchmarks/profile.sh [OUT]
#
# OUT (default: results) gets profile.ncu-rep, its tables as CSV (details, SASS with samples) and step-*.csv. The card's
# clocks are left as they are. LIMIT: seconds for each program. TINY=1: small sizes, to try the script.
set -u
out=${1:-results}
limit=${LIMIT:-150} tiny=${TINY:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$out"
status=0

timeout "$limit" python3 -m benchmarks step ${tiny:+--model tiny --length 300} --output "$out" || status=1

ncu=$(command -v ncu || ls -d /opt/nvidia/nsight-compute/*/ncu 2>/dev/null | tail -n 1)
[ -n "$ncu" ] || { echo "no ncu"; exit 1; }
timeout "$limit" "$ncu" --set full --clock-control none --profile-from-start off -f \
  -o "$out/profile" python3 -m benchmarks launch --profile ${tiny:+--tiny} || status=1
[ -s "$out/profile.ncu-rep" ] || { echo "ncu wrote no report"; exit 1; }
timeout 60 "$ncu" --import "$out/profile.ncu-rep" --page details --csv >"$out/profile-details.csv" || status=1
# Where the samples fall, instruction by instruction: large, so packed.
timeout 60 "$ncu" --import "$out/profile.ncu-rep" --page source --csv 2>/dev/null | gzip -9 >"$out/profile-source.csv.gz"
python3 - "$out/profile-details.csv" <<'EOF'
import csv, sys
wanted = ("Duration", "Compute (SM) Throughput", "DRAM Throughput", "L2 Hit Rate", "Registers Per Thread",
          "Executed Ipc Active", "No Eligible", "Achieved Occupancy")
with open(sys.argv[1], newline="") as file:
    lines = [line for line in file if line.startswith('"')]
kernels = {}
for row in csv.DictReader(lines):
    if row["Metric Name"] in wanted:
        name = row["ID"] + " " + row["Kernel Name"].split("(")[0].split("<")[0].replace("void ", "")
        kernels.setdefault(name, {})[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
for name, found in kernels.items():
    print(name[:60], "; ".join(f"{key} {found[key]}" for key in wanted if key in found))
EOF
exit $status
