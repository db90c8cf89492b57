"""Draw demo data: python -m common.demo --data demo."""

from common.demo.data import main
from common.process.main import run

run(main)
