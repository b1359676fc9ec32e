"""What dice_op costs, beside what people could use instead.

python -m benchmarks                      on this machine's processors: see __main__.py
python benchmarks/stability.py            where Dice losses break
python build_tools/gpu_check.py           on a GPU, with gpu_*.py
"""
