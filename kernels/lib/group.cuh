// Several problems of one kind in one launch, so that small ones do not leave a device idle one after
// the other. They may touch nothing that another of them writes.
#pragma once

// Units of work (blocks, or tiles) are numbered through: problem i has those from first[i] to the
// first of the next, the last problem those to `end`. Places beyond the last have first = INT_MAX.
template <class Problem>
struct Group {
    static constexpr int kMost = 4;
    Problem problem[kMost];
    int first[kMost];
    int end;
    int pad[3];

    // The problem that unit `unit` belongs to.
    __device__ __forceinline__ int of(int unit) const {
        int found = 0;
#pragma unroll
        for (int i = 1; i < kMost; ++i) {
            if (unit >= first[i]) found = i;
        }
        return found;
    }
};
