"""A run begun, continued, rewound, branched, exported."""
