from benchmarks.same_numbers.run import main

main()
