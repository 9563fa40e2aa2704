// Tasks on the caller's threads.
#pragma once

#include "vec.h"

namespace power_cpu {
namespace POWER_ISA {

POWER_INLINE int thread_count(const PowerExecutor *executor) { return executor ? executor->threads : 1; }

// f(task, slot) for every task, in order of their start; slot < thread_count() names the scratch of the thread. Which thread takes
// a task is left to chance, so a task may write only what no other task touches.
template <class F> inline void parallel(const PowerExecutor *executor, int64_t tasks, F f) {
  struct Shared {
    F &f;
    int64_t tasks, next;
    static void body(void *context, int64_t slot) {
      Shared &shared = *static_cast<Shared *>(context);
      for (;;) {
        int64_t task = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED);
        if (task >= shared.tasks) return;
        shared.f(task, int(slot));
      }
    }
  } shared{f, tasks, 0};
  int64_t slots = min64(thread_count(executor), tasks);
  if (slots > 1)
    executor->run(executor->pool, slots, &Shared::body, &shared);
  else
    Shared::body(&shared, 0);
}

}  // namespace POWER_ISA
}  // namespace power_cpu
