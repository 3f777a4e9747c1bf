from halfbyte.cli import main

main()
