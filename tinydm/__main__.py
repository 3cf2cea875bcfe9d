"""python -m tinydm COMMAND"""

from tinydm.cli import main

main()
