"bench/RESULTS.md: one section a benchmark, replaced when it is run again, each with the machine that it ran on."
import os
import platform
import re
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

FILE = Path(__file__).parent/'RESULTS.md'


def machine() -> str:
    "Processor, cores, GPU and versions, in a line."
    info = Path('/proc/cpuinfo')
    names = re.findall(r'model name\s*:\s*(.+)', info.read_text()) if info.exists() else []
    import torch
    parts = [names[0] if names else platform.processor() or platform.machine(), f'{os.cpu_count()} cores', torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU',
             f'Python {platform.python_version()}']
    for package in ('torch', 'torchvision', 'fastai', 'timm', 'onnxruntime'):
        try: parts.append(f'{package} {version(package)}')
        except PackageNotFoundError: continue
    return ', '.join(parts)


def write(name: str, section: str):
    "Put `section`, and what it was measured on, between the marks of `name`, at the end where there are none yet."
    start, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    old = FILE.read_text(encoding='utf8') if FILE.exists() else '# Measured\n'
    if start not in old: old = f'{old.rstrip()}\n\n{start}\n{end}\n'
    section = f'{section.rstrip()}\n\nWritten {date.today()} on {machine()}.'
    FILE.write_text(re.sub(f'{start}.*{end}', lambda m: f'{start}\n{section}\n{end}', old, flags=re.S), encoding='utf8')


def read(name: str) -> str:
    "What stands between the marks of `name`: nothing where it was never written."
    return FILE.read_text(encoding='utf8').partition(f'<!-- {name} -->')[2].partition(f'<!-- /{name} -->')[0] if FILE.exists() else ''
