// The OpenMP runtime in plain threads: ThreadSanitizer sees how they wait for each other, which it does not
// in libgomp. NO_BARRIER makes it wrong, to see that the sanitizer would notice.
#include <pthread.h>

#include <thread>
#include <vector>

namespace {
thread_local int id = 0;
int team = 1;
pthread_barrier_t barrier;
}  // namespace

extern "C" {

int omp_get_thread_num() { return id; }
int omp_get_num_threads() { return team; }

void GOMP_barrier() {
#ifndef NO_BARRIER
    pthread_barrier_wait(&barrier);
#endif
}

// one thread in each team gets true; the barrier after a single construct is called for by the compiler
bool GOMP_single_start() { return id == 0; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    team = int(threads);
    pthread_barrier_init(&barrier, nullptr, threads);
    std::vector<std::thread> others;
    for (int i = 1; i < team; ++i) {
        others.emplace_back([=] {
            id = i;
            body(data);
        });
    }
    body(data);
    for (std::thread& other : others) other.join();
    pthread_barrier_destroy(&barrier);
    team = 1;
}
}
