"""The UNets of ADM and IDDPM, and the classifiers that guide them."""
