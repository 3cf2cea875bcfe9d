"""Real integers: engines that compute a hardened network on int8, bit for bit as it is defined."""
