"""How engines that llorch runs itself are started, watched and ended."""
