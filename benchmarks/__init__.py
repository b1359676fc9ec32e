"""Measures what dice_op costs, beside what people could use instead.

python -m benchmarks                      measures on this machine's processors (see __main__.py)
python -m benchmarks.stability            shows where Dice losses break
python build_tools/gpu_check.py           measures on a GPU, with the modules of gpu/
"""
